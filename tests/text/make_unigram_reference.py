#!/usr/bin/env python3
"""Writes unigram_reference.jsonl: small Unigram tokenizers trained by Hugging Face's `tokenizers`, and what it makes of a few
strings with them. The lines are like those of components_reference.jsonl.

    python make_unigram_reference.py OUT.jsonl
"""
import json
import random
import sys

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from make_components_reference import TEXTS

WORDS = "the cat sat on a mat and that hat was what the other cats had sat at when they were here there hello world caf\u00e9 stra\u00dfe leading trailing word words".split()


def corpus():
    rng = random.Random(7)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 12))) for _ in range(400)]


def train(fallback):
    tok = Tokenizer(models.Unigram())
    tok.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"] + (["<0x%02X>" % b for b in range(256)] if fallback else [])
    tok.train_from_iterator(corpus(), trainers.UnigramTrainer(vocab_size=120 + len(special), special_tokens=special[:3], unk_token="<unk>", show_progress=False))
    tok.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]) if fallback else decoders.Metaspace()
    tok.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made = json.loads(tok.to_str())
    if fallback:
        made["model"]["vocab"] += [[s, -20.0] for s in special[3:]]
        made["model"]["byte_fallback"] = True
    return made


def whole(made):
    """No pre-tokeniser cuts: words are found across spaces."""
    made = json.loads(json.dumps(made))
    made["pre_tokenizer"] = None
    made["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    return made


def main(out):
    plain, fallback = train(False), train(True)
    with open(out, "w", encoding="utf-8") as file:
        for name, made in (("unigram", plain), ("unigram, bytes", fallback), ("unigram, whole", whole(plain))):
            tok = Tokenizer.from_str(json.dumps(made))
            cases = []
            for text in TEXTS + [" ".join(WORDS), "".join(WORDS), "thecatsatonthemat \u4f60\u4f60\u597d x\U0001f600\U0001f600"]:
                ids = tok.encode(text, add_special_tokens=False).ids
                cases.append({"text": text, "ids": ids, "ids_special": tok.encode(text).ids, "decoded": tok.decode(ids, skip_special_tokens=False)})
            file.write(json.dumps({"name": name, "tokenizer": made, "cases": cases}) + "\n")


main(sys.argv[1])

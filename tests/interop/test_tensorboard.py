"""PyPI's tensorboard reads the event files back: checksums, tags, steps, numbers as in log.jsonl."""
import json
import shutil

from common import WORK, Checks, lua, skip

try:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
except ImportError:
    skip("tensorboard is not installed: pip install tensorboard")


def main():
    checks = Checks()
    out = WORK / "board"
    shutil.rmtree(out, ignore_errors=True)
    lua("board.lua", out)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    files = list((out / "runs").iterdir())
    checks.check(len(files) == 1, f"one event file: {files[0].name}")
    records = list(RawEventFileLoader(str(files[0])).Load())
    checks.check(len(records) == len(lines) + 1, f"{len(records)} records, their checksums accepted")
    board = EventAccumulator(str(out / "runs")).Reload()
    for tag, key in (("train/loss", "loss"), ("train/learning_rate", "learning_rate"), ("train/grad_norm", "grad_norm"), ("eval/loss", "eval_loss")):
        read = [(s.step, s.value) for s in board.Scalars(tag)]
        wrote = [(line["step"], line[key]) for line in lines if key in line]
        same = len(read) == len(wrote) > 0 and all(a == c and abs(b - d) <= 1e-6 * abs(d) for (a, b), (c, d) in zip(read, wrote))
        checks.check(same, f"{tag}: {len(read)} numbers as in log.jsonl")
    checks.end()


main()

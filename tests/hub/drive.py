#!/usr/bin/env python3
"""Runs a command against the imitation hub that holds an answer back (its fault "hold").

    python3 tests/hub/drive.py interrupt DIR COMMAND...    Ctrl-C while the answer is held; prints the exit status
    python3 tests/hub/drive.py pair DIR COMMAND...         twice at once, the answer let go once both want it; prints both
                                                           outputs and statuses
"""
import os
import signal
import subprocess
import sys
import time

how, top, command = sys.argv[1], sys.argv[2], sys.argv[3:]
LIMIT = time.monotonic() + 60


def until(true):
    while not true():
        if time.monotonic() > LIMIT:
            sys.exit("the hub was never asked")
        time.sleep(0.01)


def heads():
    with open(os.path.join(top, "log")) as f:
        return sum(line.startswith("HEAD") and "model.safetensors" in line for line in f)


def start():
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


first = start()
until(lambda: os.path.exists(os.path.join(top, "held")))
if how == "interrupt":
    blobs = os.path.join(os.environ["HF_HOME"], "hub", "models--org--one", "blobs")
    part = lambda: any(n.endswith(".incomplete") and os.path.getsize(os.path.join(blobs, n)) > 1000 for n in os.listdir(blobs))
    until(part)
    first.send_signal(signal.SIGINT)
    first.communicate()
    print(first.returncode)
else:
    second = start()
    until(lambda: heads() >= 2)
open(os.path.join(top, "go"), "w").close()
if how == "pair":
    for child in (first, second):
        print(child.communicate()[0].strip(), child.returncode)

"""Runs a program on a pseudo terminal, as a person would.

    terminal.py PROGRAM [WORD ...] < DIALOGUE

Each line of DIALOGUE is EXPECTED|TYPED: once EXPECTED has been printed (after what the line before expected), TYPED and Enter are sent;
^C alone is Ctrl-C, ^D the end of input. Prints all that the terminal showed and exits as the program does; 99 when something
expected never came.
"""
import os
import pty
import select
import sys

PATIENCE = 60


def main():
    dialogue = [line.rstrip("\n").split("|", 1) for line in sys.stdin]
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "dumb"
        os.execv(sys.argv[1], sys.argv[1:])
    shown = seen = ""
    keys = {"^C": b"\x03", "^D": b"\x04"}
    while True:
        while dialogue and dialogue[0][0] in seen:
            expected, typed = dialogue.pop(0)
            seen = seen[seen.index(expected) + len(expected) :]
            os.write(terminal, keys.get(typed, typed.encode() + b"\n"))
        ready, _, _ = select.select([terminal], [], [], PATIENCE)
        try:
            data = os.read(terminal, 65536).decode(errors="replace") if ready else None
        except OSError:  # the program has closed its end
            data = ""
        if data is None:
            os.kill(pid, 9)
        if not data:
            break
        shown, seen = shown + data, seen + data
    sys.stdout.write(shown)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    sys.exit(99 if dialogue or data is None else status if status >= 0 else 128 - status)


main()

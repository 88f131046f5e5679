"""Runs a program on a pseudo terminal, as a person would.

    terminal.py PROGRAM [WORD ...] < DIALOGUE

Each line of DIALOGUE is EXPECTED|TYPED: once EXPECTED has been printed (after what the line before expected) and a prompt waits
behind it, TYPED and Enter are sent. ^C alone is Ctrl-C and waits for no prompt, ^D is the end of input, ^P the arrow up. What
ends with \\t is sent with the tab key and without Enter, ^P likewise; the line behind it waits for what the key makes appear,
and for no prompt. Prints all that the terminal showed and exits as the program does; 99 when something expected never came:
what the kernel knows of the program's signals is printed then.

What is typed before the prompt stands there still meets a terminal that edits lines itself: it takes ^D for itself, and the
program, which reads key by key from then on, never hears of it.
"""
import os
import pty
import select
import sys
import time

PATIENCE = 120


def is_turn(expected, typed, seen, midline):
    return expected in seen and (typed == "^C" or midline or seen.endswith("> "))


def read(terminal, until):
    """What comes next, "" at the end, None when nothing comes in time. What is ready may be gone again: Ctrl-C empties the
    terminal's buffers."""
    while (left := until - time.monotonic()) > 0:
        select.select([terminal], [], [], left)
        try:
            return os.read(terminal, 65536).decode(errors="replace")
        except BlockingIOError:
            pass
        except OSError:  # the program has closed its end
            return ""
    return None


def signals(pid):
    with open(f"/proc/{pid}/status") as status:
        return " ".join(line.strip() for line in status if line.startswith(("State", "Sig", "ShdPnd")))


def main():
    dialogue = [line.rstrip("\n").split("|", 1) for line in sys.stdin]
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="dumb", LC_ALL="C.UTF-8")
        os.execv(sys.argv[1], sys.argv[1:])
    os.set_blocking(terminal, False)
    shown = seen = state = ""
    midline = False
    keys = {"^C": b"\x03", "^D": b"\x04", "^P": b"\x10"}
    until = time.monotonic() + PATIENCE
    while True:
        while dialogue and is_turn(*dialogue[0], seen, midline):
            typed, seen = dialogue.pop(0)[1], ""
            tab = typed.endswith("\\t")
            midline = tab or typed == "^P"
            os.write(terminal, keys.get(typed, typed[:-2].encode() + b"\t" if tab else typed.encode() + b"\n"))
            until = time.monotonic() + PATIENCE
        data = read(terminal, until)
        if data is None:
            state = signals(pid)
            os.kill(pid, 9)
        if not data:
            break
        shown, seen = shown + data, seen + data
    sys.stdout.write(shown)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if dialogue:
        print(f"\n[{dialogue[0][0]!r} never came; exit status {status}; {state}]")
    sys.exit(99 if dialogue or data is None else status if status >= 0 else 128 - status)


main()

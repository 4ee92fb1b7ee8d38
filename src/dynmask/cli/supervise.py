"""Keep a server: report that it ended by itself, and start it again if that was asked for.

vLLM ends with exit code 0 when its engine has died, and where the server's own process is killed
the engine's stay behind and keep their memory. So ``dynmask serve`` runs it under this file: a
program of the standard library alone, in a process that holds no tensors and no model library.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

__all__ = ["FAILURE", "Supervisor", "command_of", "main"]

FAILURE, USAGE = 1, 2
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_GONE_S = 5.0


class Supervisor:
    """Runs a command until it ends because it was asked to, or too often by itself.

    Args:
        command: of the server.
        restarts: how many times it is started again.
    """

    def __init__(self, command: Sequence[str], restarts: int) -> None:
        self.command, self.restarts = list(command), restarts
        self._server: subprocess.Popen[bytes] | None = None
        self._asked: int | None = None

    def run(self) -> int:
        """The exit code: the server's own when it was asked to stop, else never 0."""
        for number in FORWARDED:
            outlives = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            if not outlives:  # under nohup it goes on when its terminal is closed
                signal.signal(number, self._forward)
        restarted = 0
        while True:
            code = self._once()
            if self._asked is not None or code == USAGE:  # a wrong option stays wrong
                return _exit_code(code)
            again = restarted < self.restarts
            rest = "giving up" if self.restarts else "start it again, or let --restart N do that"
            if again:
                rest = f"starting it again ({restarted + 1} of {self.restarts})"
            _say(f"the server ended by itself, {_told(code)}; {rest}")
            if not again:
                return _exit_code(code) or FAILURE
            restarted += 1

    def _once(self) -> int:
        """Start the server, wait for its end, leave nothing of it behind."""
        if self._asked is not None:  # between two servers
            return 0
        self._server = subprocess.Popen(self.command, process_group=0, preexec_fn=_end_with_parent)
        if self._asked is not None:  # while it was being started
            self._server.send_signal(self._asked)
        code = self._server.wait()
        _end_group(self._server.pid)
        return code

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Hand a signal on to the server, which ends its own processes."""
        self._asked = number
        if self._server is not None:
            self._server.send_signal(number)


def command_of(command: Sequence[str], restarts: int) -> list[str]:
    """The command that runs another under this file, by this Python."""
    # -P: the neighbours of this file have names of the standard library's modules
    return [sys.executable, "-P", __file__, "--restart", str(restarts), "--", *command]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that follows -- and return its exit code."""
    parser = argparse.ArgumentParser(description="run a server; report or mend its end")
    parser.add_argument("--restart", type=int, default=0, help="how many times")
    given = list(sys.argv[1:] if argv is None else argv)
    at = given.index("--")  # the server may have a -- of its own
    return Supervisor(given[at + 1 :], parser.parse_args(given[:at]).restart).run()


def _say(text: str) -> None:
    # a line of its own: what a server says last may lack its end
    print(f"\ndynmask serve: {text}", file=sys.stderr, flush=True)


def _told(code: int) -> str:
    """An end in words."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"with exit code {code}" + (
        " (an error of its engine is reported above)" if not code else ""
    )


def _exit_code(code: int) -> int:
    """As a shell counts it: 128 and the signal."""
    return 128 - code if code < 0 else code


def _end_with_parent() -> None:
    """In the server, before it starts: be told to stop when this process is killed (Linux)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _end_group(group: int) -> None:
    """End what a server has left running, and wait until its memory and its port are free."""
    stop = time.monotonic() + _GONE_S
    while time.monotonic() < stop:
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-group, os.WNOHANG)  # in a container they may have become our own children
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())

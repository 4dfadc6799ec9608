"""A shell command of the user's when a start ends: a message, a page, a ticket."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Literal

from megatron_ext.runtime.faults import is_told_here

PATIENCE_S = 60
"""Seconds that the command may take: the launcher waits for it."""


class Notice:
    """What is known of the end so far."""

    def __init__(self, command: str | None, run_dir: str) -> None:
        self._command = command
        self._run_dir = run_dir
        self._step = 0
        self._outcome: Literal["finished", "stopped"] = "stopped"

    @classmethod
    @contextlib.contextmanager
    def at_end(cls, command: str | None, run_dir: str, *, is_main: bool) -> Iterator["Notice"]:
        """Run `command` when the body ends: on the main rank, or after a failure on the one rank that reports it."""
        notice = cls(command, run_dir)
        try:
            yield notice
        except Exception as error:
            if command is not None and is_told_here(error):
                notice._send("failed", f"{type(error).__name__}: {error}")
            raise
        if command is not None and is_main:
            notice._send(notice._outcome, f"step {notice._step}")

    def reached(self, step: int, last: int) -> None:
        """The start has ended in good order after `step`; the run ends at step `last`."""
        self._step = step
        self._outcome = "finished" if step >= last else "stopped"

    def _send(self, outcome: str, message: str) -> None:
        told = {"RUN_DIR": self._run_dir, "OUTCOME": outcome, "STEP": str(self._step), "MESSAGE": message}
        try:
            environment = os.environ | {f"EMU3_{name}": value for name, value in told.items()}
            result = subprocess.run(self._command, shell=True, env=environment, timeout=PATIENCE_S, check=False)
            failure = f"it ended with {result.returncode}" if result.returncode else None
        except subprocess.TimeoutExpired:
            failure = f"it took more than {PATIENCE_S} s"
        if failure:
            print(f"resilience.notify {self._command!r}: {failure}", file=sys.stderr, flush=True)

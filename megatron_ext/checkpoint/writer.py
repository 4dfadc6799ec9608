"""A process that writes one rank's share of a checkpoint while training goes on.

It is forked: it sees the tensors as they are at that moment, whatever training does to them afterwards, and starts in
milliseconds. What a forked process must not do, it does not: no second thread (locks that other threads held stay
locked in it), no call of an accelerator, no garbage collection, no exit handlers. It cannot outlive its parent.
"""

import contextlib
import gc
import os
import pickle
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import IO, Any

import torch

from megatron_ext.processes import end_with_parent


class WriteError(OSError):
    """A writer did not write what it should; the message says why."""


class Writer:
    """Runs `write` in a process of its own and keeps its result."""

    def __init__(self, write: Callable[[], Any]) -> None:
        """Start it. `write` returns something picklable.

        Raises:
            OSError: the system has no room for another process.
        """
        # A file, not a pipe: nobody has to read while the writer writes, and a killed one leaves no half message.
        self._report = tempfile.TemporaryFile()
        self._status: int | None = None
        parent = os.getpid()
        with warnings.catch_warnings():
            # Python 3.12 warns of forks beside threads; the child keeps to what is safe then.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            _run_in_child(write, self._report, parent)

    def finished(self) -> bool:
        """Whether the process has ended, in whatever way."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status is not None

    def result(self) -> Any:
        """What `write` returned, once `finished`.

        Raises:
            WriteError: it raised, or the process was killed.
        """
        if self._status != 0:
            name = signal.Signals(-self._status).name if self._status < 0 else f"exit code {self._status}"
            raise WriteError(f"the writer process ended with {name}")
        self._report.seek(0)
        result, error = pickle.load(self._report)
        if error is not None:
            raise WriteError(error)
        return result

    def kill(self) -> None:
        """End the process. One that is stuck in a system call of a dead file system ends when it can: its files are in
        a folder of their own, which nothing reads.
        """
        if not self.finished():
            os.kill(self.pid, signal.SIGKILL)
        patience = time.monotonic() + 1.0
        while not self.finished() and time.monotonic() < patience:
            time.sleep(0.01)


def _run_in_child(write: Callable[[], Any], report: IO[bytes], parent: int) -> None:
    """The whole life of the forked process."""
    code = 1
    try:
        gc.disable()  # a collection would run destructors of the parent's objects, on the accelerator too
        end_with_parent(parent)
        # The signals that ask a run for a last checkpoint go to the whole process group: this is that checkpoint.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        _close_files_but(report.fileno())
        torch.set_num_threads(1)
        try:
            outcome = write(), None
        except Exception as error:
            outcome = None, f"{type(error).__name__}: {error}"
        pickle.dump(outcome, report)
        report.flush()
        code = 0
    finally:
        os._exit(code)  # no exit handlers: they are the parent's


def _close_files_but(kept: int) -> None:
    """Close what was open in the parent, its sockets above all: when it is killed, its peers must see them close."""
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number != kept:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(number)

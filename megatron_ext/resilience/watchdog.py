"""A thread that ends the process when the main thread does not come on: a hung collective, a dead file system.

Every rank has one. All of them wait for each other in every step, so all of them see the hang within seconds; each
prints the stacks of its threads, which tells who waits where, before the first of them ends and the launcher ends the
others.
"""

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_ext.config import InputError
from megatron_ext.config.resilience import ResilienceConfig

EXIT_CODE = 74
"""Of a rank that ended itself for a hang."""

GRACE_S = 10.0
"""Seconds between a rank's stacks and its end, in which the others print theirs."""

STEPS_FOR_A_MEDIAN = 8
MEDIAN_OF = 64


class _Watched(NamedTuple):
    """What the main thread does. One object: the limit of one activity is never held against the age of another."""

    activity: str
    since: float
    """By time.monotonic()."""
    limit: float
    """Seconds."""


class Watchdog:
    """Ends the process when `alive` is not called in time."""

    def __init__(self, section: ResilienceConfig, folder: Path, rank: int, tell: Callable[[str, float], None]) -> None:
        """`folder` gets the stacks; `tell(activity, seconds)` is called before the end, from another thread."""
        self._section = section
        self._folder = folder
        self._rank = rank
        self._tell = tell
        self._watched = _Watched("the start", time.monotonic(), section.hang_timeout_s)
        self._steps: deque[float] = deque(maxlen=MEDIAN_OF)
        self._closed = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while open; with hang_timeout_s 0 nothing is watched."""
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watched = self._watched._replace(since=time.monotonic())
        if self._section.hang_timeout_s:
            thread.start()
        try:
            yield
        finally:
            self._closed.set()
            if thread.is_alive():
                thread.join()

    @property
    def step_seconds(self) -> float:
        """Median of the last steps; 0 before the first."""
        return statistics.median(self._steps) if self._steps else 0.0

    def alive(self, activity: str, *, is_step: bool = False, more_s: float = 0.0) -> None:
        """The main thread begins `activity`, which may take `more_s` longer than hang_timeout_s. Only steps have a
        limit of their own, from the steps before."""
        now = time.monotonic()
        if self._watched.activity.startswith("step"):
            self._steps.append(now - self._watched.since)
        limit, factor = self._section.hang_timeout_s + more_s, self._section.slow_step_factor
        if is_step and factor is not None and len(self._steps) >= STEPS_FOR_A_MEDIAN:
            limit = min(limit, factor * self.step_seconds)
        self._watched = _Watched(activity, now, limit)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._section.hang_timeout_s / 10)):
            now = time.monotonic()  # first: what is watched after it was watched at it, or has only begun
            activity, since, limit = self._watched
            if now - since > limit:
                self._end(activity, now - since, limit)

    def _end(self, activity: str, seconds: float, limit: float) -> None:
        # First of all: what is written here may go to the very disk that hangs.
        threading.Thread(target=self._exit_after, args=(2 * GRACE_S,), daemon=True).start()
        path = self._folder / f"rank_{self._rank:05d}.txt"
        print(
            f"rank {self._rank}: {activity} has taken {seconds:.0f} s, more than {limit:.0f} s: ending with exit "
            f"code {EXIT_CODE}; stacks of all threads here and in {path}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        with contextlib.suppress(OSError, InputError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
            self._tell(activity, seconds)
        self._exit_after(GRACE_S)

    def _exit_after(self, seconds: float) -> None:
        if not self._closed.wait(seconds):
            os._exit(EXIT_CODE)  # the main thread cannot be woken: no exception, no exit handler

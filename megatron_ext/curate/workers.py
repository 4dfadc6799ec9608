"""Processes that work on many items at once and give the results in the items' order."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from megatron_ext.config import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Processes with one thread each; 0 of them work in this process. A context manager."""

    def __init__(self, count: int, prepare: Callable[[], None]) -> None:
        """`prepare` is called first in each process."""
        if count < 0:
            raise InputError(f"workers = {count}: give 0 for this process, or a number of processes")
        self._ahead = 2 * count  # so that none waits for the one whose result is next
        self._pool = None
        if count == 0:
            prepare()
        else:
            # Spawned: a fork of a process with threads, as numeric libraries have, may hang.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(count, context, _start, (prepare,))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def in_order(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """(item, function(item)) in the order of the items, a few of which are taken and worked on ahead.

        Raises:
            InputError: a process was killed.
        """
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        with _told():
            for item in items:
                waiting.append((item, self._submit(function, item)))
                if len(waiting) > self._ahead:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()

    def _submit(self, function: Callable[[Item], Result], item: Item) -> "Future[Result]":
        if self._pool:
            return self._pool.submit(function, item)
        future: Future[Result] = Future()
        future.set_result(function(item))
        return future


def _start(prepare: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program, which ends its processes
    threading.Thread(target=_end_with_program, daemon=True).start()
    prepare()


def _end_with_program() -> None:
    """End when the program was killed: a process of concurrent.futures would wait for work for ever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise InputError(
            "workers: a process was killed, perhaps for want of memory: start again, with fewer; finished parts stay"
        ) from None

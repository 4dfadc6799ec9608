"""A function applied to many items by other processes, results in the items' order.

Each process has a pipe of its own to its parent and ends when the parent does, killed or not, and in the midst of an
item: nothing is left behind, in memory neither (a shared segment would outlive its owner). A process that dies is
replaced and its item tried again; so one file that crashes a decoder costs that file, and is known by name; likewise
one over which a decoder hangs.
"""

import collections
import contextlib
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, Generic, TypeVar

from megatron_ext.media.errors import MediaError
from megatron_ext.processes import end_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")

ATTEMPTS = 3
"""Processes that may die over one item before the item is given up: one death may be the system's, for memory."""

AHEAD = 4
"""Items per process that are begun before the results of earlier ones are asked for."""


class WorkerPool(Generic[Item, Result]):
    """Processes that apply one function; use it as a context."""

    def __init__(self, function: Callable[[Item], Result], count: int, *, timeout_s: float = 0.0) -> None:
        """`count` processes start at once; with 0 the function is applied in this one. An item over which a process
        takes longer than `timeout_s` is given up; 0 waits for ever. The start of a process is not counted.

        `function` must be picklable, and defined in a module: a process does not import the program that is run.
        """
        if count and getattr(function, "__module__", None) == "__main__":
            raise ValueError(f"{function} is defined in the program that runs: move it into a module")
        self._function = function
        self._count = count
        self._timeout_s = timeout_s
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._is_open = True
        self._threads = ThreadPoolExecutor(max(count, 1))
        # The kernel ends a process with the thread that started it: these live until `__exit__`, the caller's may not.
        self._workers = list(self._threads.map(_Worker, [function] * count))
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> "WorkerPool[Item, Result]":
        return self

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        for worker in self._workers:
            worker.end()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:  # one may have been replaced in between
            worker.end()

    @property
    def process_ids(self) -> list[int]:
        """The processes there are now."""
        return [worker.process_id for worker in self._workers]

    def map(self, items: Iterable[Item]) -> Iterator[Result | MediaError]:
        """The function's result for each item, in order; a MediaError that it raises takes its place."""
        if not self._count:
            yield from map(self._applied, items)
            return
        begun: collections.deque[Future[Result | MediaError]] = collections.deque()
        for item in items:
            begun.append(self._threads.submit(self._sent, item))
            if len(begun) > AHEAD * self._count:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()

    def _applied(self, item: Item) -> Result | MediaError:
        try:
            return self._function(item)
        except MediaError as error:
            return error

    def _sent(self, item: Item) -> Result | MediaError:
        worker = self._idle.get()
        try:
            for _ in range(ATTEMPTS):
                try:
                    return worker.apply(item, self._timeout_s)
                except TimeoutError:
                    worker.restart()
                    return MediaError(f"a process was not done with it after {self._timeout_s:g} s")
                except (EOFError, OSError, pickle.UnpicklingError):  # its pipe broke, perhaps within a result
                    if not self._is_open:
                        raise
                    code = worker.restart()
            return MediaError(f"{ATTEMPTS} processes died over it ({_ending(code)})")
        finally:
            self._idle.put(worker)


class _Worker:
    """One process."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self._start()

    @property
    def process_id(self) -> int:
        return self._process.pid

    def apply(self, item: Any, timeout_s: float) -> Any:
        """The function's result, or the MediaError it raised.

        Raises:
            TimeoutError: no result within `timeout_s`, if that is not 0.
            EOFError, OSError, pickle.UnpicklingError: the process is gone.
            RuntimeError: the function raised something else.
        """
        if not self._is_ready:
            self._is_ready = pickle.load(self._process.stdout)  # however long its imports take: no item is to blame
        _send(item, self._process.stdin)
        if timeout_s and not self._results.poll(1000 * timeout_s):
            raise TimeoutError
        fault, result = pickle.load(self._process.stdout)
        if fault:
            raise RuntimeError(f"in a worker process:\n{fault}")
        return result

    def restart(self) -> int:
        """A new process for one that died, or hangs; returns how that ended, as subprocess does."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)  # its pipe closes a moment before it has ended
        code = self.end()
        self._start()
        return code

    def end(self) -> int:
        """Kill the process."""
        self._process.kill()
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was not sent cannot be
                pipe.close()
        return code

    def _start(self) -> None:
        # A plain child: multiprocessing would import the whole program in each, or fork it with all its threads.
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve({os.getpid()})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        self._is_ready = False
        self._results = select.poll()
        self._results.register(self._process.stdout, select.POLLIN)
        with contextlib.suppress(OSError):  # it is gone already: `apply` will see it
            _send(self._function, self._process.stdin)


def serve(parent: int) -> None:
    """What a process of process `parent` does: read a function, say so, then read items, until the pipe ends; write
    each result.
    """
    end_with_parent(parent)  # while it hangs over an item it does not come to see the pipe's end
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's Ctrl-C: it decides what becomes of its workers
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the results
    items = sys.stdin.buffer
    with contextlib.suppress(EOFError, BrokenPipeError):
        function = pickle.load(items)
        _send(True, results)
        while True:
            _send(_outcome(function, pickle.load(items)), results)
    os._exit(0)  # at once: nobody waits for the end of the interpreter, and a closed pipe has nothing to flush


def _outcome(function: Callable[[Any], Any], item: Any) -> tuple[str, Any]:
    """(what went wrong, else nothing; the result)."""
    try:
        return "", function(item)
    except MediaError as error:
        return "", error
    except Exception:
        return traceback.format_exc(), None


def _send(content: Any, pipe: BinaryIO) -> None:
    pickle.dump(content, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

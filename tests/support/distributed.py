"""Run functions on real torch.distributed ranks, one process each: the fixture `ranks` holds those of a session."""

import contextlib
import gc
import os
import pickle
import queue
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import _rendezvous_handlers

from tests.support.warm import context

TIMEOUT_S = 600
_place: list[int] = [0, 0]
"""(task, join): where in the shared store the next process group of this rank meets its peers."""


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`Ranks.run` on ranks of its own, which end: for what must not be left behind, as the memory of a GPU."""
    ranks = Ranks()
    try:
        return ranks.run(function, world_size, *args)
    finally:
        ranks.close()


class Ranks:
    """Processes that are started once and then run one function after the other."""

    def __init__(self) -> None:
        self._context = context()
        self._results = self._context.Queue()
        # As torchrun does: the parent holds the store, so no rank has to win a port that was free a moment ago.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes: list[tuple[Any, Any]] = []  # (process, the end of the pipe that it takes its work from)
        self._num_tasks = 0

    def run(self, function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
        """`function(*args)` on `world_size` ranks, with the environment that torchrun would give them.

        Returns the ranks' results (picklable) in rank order. Raises AssertionError with the tracebacks of the ranks
        that failed, of which none is used again. What the function leaves behind in its process, the next one finds.
        """
        for rank in range(len(self._processes), world_size):
            theirs, ours = self._context.Pipe(duplex=False)
            process = self._context.Process(target=_serve, args=(rank, self._store.port, theirs, self._results))
            process.start()
            theirs.close()
            self._processes.append((process, ours))
        self._num_tasks += 1
        for _, pipe in self._processes[:world_size]:
            pipe.send_bytes(pickle.dumps((function, args, world_size, self._num_tasks)))
        results: dict[int, Any] = {}
        try:
            for _ in range(world_size):
                rank, result, failure = self._next_result()
                assert failure is None, f"rank {rank}:\n{failure}"
                results[rank] = pickle.loads(result)
        except BaseException:
            self._kill()  # the other ranks wait for the failed one
            raise
        return [results[rank] for rank in range(world_size)]

    def _next_result(self) -> tuple[int, bytes, str | None]:
        for _ in range(TIMEOUT_S):
            with contextlib.suppress(queue.Empty):
                return self._results.get(timeout=1)
            dead = [rank for rank, (process, _) in enumerate(self._processes) if process.exitcode is not None]
            assert not dead, f"ranks {dead} ended without a word"
        raise TimeoutError(f"no result from a rank after {TIMEOUT_S} s")

    def close(self) -> None:
        """Let the processes end."""
        for _, pipe in self._processes:
            pipe.close()
        for process, _ in self._processes:
            process.join(timeout=30)
        self._kill()

    def _kill(self) -> None:
        for process, _ in self._processes:
            if process.is_alive():
                process.kill()
        self._processes = []
        self._results = self._context.Queue()


def use_next_store() -> None:
    """On a rank, before it joins a process group again: keys of the last group must not meet those of the next."""
    _place[1] += 1
    gc.collect()  # a decoder is a cycle, and gloo's threads live as long as the groups that it refers to


def _serve(rank: int, port: int, tasks: Any, results: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    _meet_in(TCPStore("127.0.0.1", port, is_master=False))
    with contextlib.suppress(EOFError):  # the parent closed its end, or is gone
        while True:
            task = tasks.recv_bytes()
            results.put((rank, *_outcome(task)))
            gc.collect()  # first: what is frozen is never freed, and process groups keep their threads
            gc.freeze()  # the modules, so that collecting garbage between process groups does not search them each time


def _meet_in(store: Store) -> None:
    """Let every process group of this process meet in `store`, each under a prefix of its own.

    A connection for each, which is what torch opens, costs a name look-up for each, and some of those take seconds.
    """

    def meet(url: str, **unused: Any) -> Iterator[tuple[Store, int, int]]:
        task, join = _place
        yield PrefixStore(f"{task}/{join}", store), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    _rendezvous_handlers["env"] = meet


def _outcome(task: bytes) -> tuple[bytes | None, str | None]:
    """(result, None), or (None, traceback)."""
    try:
        function, args, world_size, number = pickle.loads(task)
        os.environ.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
        _place[:] = number, 0
        # Pickled here: the queue would pass tensors as handles into this process, which may be about to end.
        return pickle.dumps(function(*args)), None
    except BaseException:
        return None, traceback.format_exc()

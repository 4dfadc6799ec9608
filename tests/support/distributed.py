"""Run a function on real torch.distributed ranks, one process each."""

import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as multiprocessing
from torch.distributed import TCPStore

TIMEOUT_S = 240
NUM_STORES = 32
_ports: list[int] = []


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`function(*args)` on `world_size` spawned ranks, with the environment that torchrun would give them.

    Returns the ranks' results (picklable) in rank order. Raises AssertionError with the tracebacks of the ranks that
    failed.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    # As torchrun does: the parent holds the stores, so no rank has to win a port that was free a moment ago.
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(NUM_STORES)]
    ports = [store.port for store in stores]
    processes = [
        context.Process(target=_run_rank, args=(function, args, rank, world_size, ports, queue))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    try:
        for _ in processes:
            rank, result, failure = queue.get(timeout=TIMEOUT_S)
            if failure:
                failures[rank] = failure
                break
            results[rank] = pickle.loads(result)
    finally:
        for process in processes:
            process.join(timeout=0 if failures else 30)
            if process.is_alive():
                process.kill()
    assert not failures, "\n".join(f"rank {rank}:\n{failure}" for rank, failure in failures.items())
    return [results[rank] for rank in range(world_size)]


def use_next_store() -> None:
    """On a rank, before it joins a process group again: keys of the last one must not meet those of the next."""
    os.environ["MASTER_PORT"] = str(_ports.pop(0))


def _run_rank(function: Callable, args: tuple, rank: int, world_size: int, ports: list[int], queue: Any) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True", OMP_NUM_THREADS="1",
    )  # fmt: skip
    _ports.extend(ports)
    use_next_store()
    try:
        # Pickled here: the queue would pass tensors as handles into this process, which is about to end.
        queue.put((rank, pickle.dumps(function(*args)), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))

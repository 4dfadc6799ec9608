"""Ranks of one start agree on a name, whatever earlier starts have left in their store."""

import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from megatron_ext.runtime.meeting import PROPOSED, meet

RANKS = 4


@pytest.fixture
def server():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(server: TCPStore, timeout_s: float = 60.0) -> TCPStore:
    return TCPStore(
        "127.0.0.1", server.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
    )


def start(server: TCPStore, *, late: int) -> set[str]:
    """The names that the ranks of one start get; rank `late` comes half a second after the others."""
    names: dict[int, str] = {}

    def come(rank: int) -> None:
        time.sleep(0.5 * (rank == late))
        names[rank] = meet(client(server), rank, RANKS)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == RANKS
    return set(names.values())


@pytest.mark.parametrize("late", [0, 2])
def test_each_start_has_a_name_of_its_own(server, late):
    """Where rank 0 comes late, the others find what the start before proposed, answered and confirmed."""
    seen = [start(server, late=late) for _ in range(3)]
    assert all(len(names) == 1 for names in seen) and len(set.union(*seen)) == 3


def test_a_start_that_broke_off_is_not_joined(server):
    """Its rank 0 proposed a name, and died before all had answered."""
    server.set(PROPOSED, "old")
    server.set("old/1", "a word of then")
    [name] = start(server, late=0)
    assert name != "old"


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_for_a_rank_that_does_not_come_ends(server, rank):
    if rank == 1:
        server.set(PROPOSED, "old")
        server.set("old/all", '["a word of then"]')
    with pytest.raises(RuntimeError):
        meet(client(server, 0.5), rank, RANKS)

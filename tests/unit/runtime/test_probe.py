"""Who is missing, and from which node; as torchrun's store tells it."""

import pytest
from torch.distributed import TCPStore

from megatron_ext.runtime.probe import Roll
from tools.preflight import JOINED, STARTED, absence


@pytest.fixture
def roll_of(monkeypatch):
    """The roll that rank R of 4 holds, two ranks a node."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("WORLD_SIZE", "4")

    def make(rank: int) -> Roll:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("SLURMD_NODENAME", f"n{rank // 2}")
        return Roll()

    yield make
    del server


def test_all_come(roll_of):
    for rank in range(4):
        roll = roll_of(rank)
        roll.reach(STARTED)
    assert roll.missing(STARTED, 0.2) == {} and absence(roll, STARTED, 0.2, "n0 n1") is None
    assert roll.nodes() == {"n0", "n1"}


def test_a_rank_hangs_later_on(roll_of):
    for rank in range(4):
        roll_of(rank).reach(STARTED)
    for rank in (0, 1, 2):
        roll = roll_of(rank)
        roll.reach(JOINED)
    assert roll.missing(JOINED, 0.2) == {3: "n1"}
    assert "rank 3 (n1) did not come to the other ranks: leave" in str(absence(roll, JOINED, 0.2, "n0 n1"))


def test_nobody_is_blamed_where_all_wait(roll_of):
    """In a collective that does not end each waits for the others: to name all of them would name healthy nodes."""
    for rank in range(4):
        roll = roll_of(rank)
        roll.reach(STARTED)
    assert absence(roll, JOINED, 0.2, "n0 n1") is None


def test_nothing_is_heard_from_a_node(roll_of):
    for rank in (0, 1):
        roll = roll_of(rank)
        roll.reach(STARTED)
    fault = str(absence(roll, STARTED, 0.2, "n0 n1"))
    assert "rank 2 (node unknown), rank 3 (node unknown) did not come to its start; nothing was heard from n1" in fault


def test_without_torchrun_nobody_is_missed(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    roll = Roll()
    roll.reach(STARTED)
    assert roll.missing(STARTED, 0) == {}

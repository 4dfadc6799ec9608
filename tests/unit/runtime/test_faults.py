"""Which of many ranks reports a fault: their store, without the ranks."""

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import PrefixStore, TCPStore

from megatron_ext.config import InputError
from megatron_ext.runtime import faults


@pytest.fixture(scope="module")
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def elect(server: TCPStore, name: str, arrivals: dict[int, float]) -> list[int]:
    """The ranks that speak, when they come with these delays in seconds."""
    connected = threading.Barrier(len(arrivals), timeout=60)

    def rank_comes(rank: int, delay: float) -> bool:
        store = PrefixStore(name, TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False))
        connected.wait()
        time.sleep(delay)
        return faults._wins(store, rank)

    with ThreadPoolExecutor(len(arrivals)) as pool:
        won = list(pool.map(rank_comes, arrivals, arrivals.values()))
    return [rank for rank, wins in zip(arrivals, won, strict=True) if wins]


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_the_lowest_rank_that_comes_in_time_speaks(server, monkeypatch, nodes):
    monkeypatch.setenv("GROUP_WORLD_SIZE", nodes)
    monkeypatch.setattr(faults, "SETTLE_S", 1.0)
    assert elect(server, f"all{nodes}", {7: 0, 3: 0.1, 0: 0.2, 5: 0}) == [0]
    assert elect(server, f"some{nodes}", {7: 0, 3: 0.3, 5: 0.1}) == [3]
    assert elect(server, f"one{nodes}", {7: 0}) == [7]


def test_one_rank_speaks_however_late_the_others_are(server, monkeypatch):
    monkeypatch.setattr(faults, "SETTLE_S", 0.1)
    assert elect(server, "late", {1: 0, 0: 0.5}) == [1]
    chance = random.Random(0)
    for trial in range(5):
        arrivals = {rank: chance.uniform(0, 0.2) for rank in range(8)}
        assert len(elect(server, f"trial{trial}", arrivals)) == 1, arrivals


@pytest.fixture
def on_a_rank(server, monkeypatch):
    monkeypatch.setattr(faults, "SETTLE_S", 0.1)
    previous = signal.getsignal(signal.SIGTERM)
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port),
        "WORLD_SIZE": "2", "RANK": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    yield
    signal.signal(signal.SIGTERM, previous)


def test_an_echo_is_silent_and_a_bug_is_not(on_a_rank, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "11")
    assert faults.is_told_here(RuntimeError("a bug"))
    assert faults.is_told_here(InputError("a fault"))
    assert not faults.is_told_here(RuntimeError("connection closed by peer"))
    assert not faults.is_told_here(InputError("the same fault, later"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "12")  # torchrun's next attempt
    assert faults.is_told_here(InputError("the fault again"))


def test_the_rank_that_speaks_is_not_cut_short(on_a_rank):
    faults.is_told_here(InputError("a fault"))
    os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does when another rank has exited
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_without_torchrun_every_process_speaks(on_a_rank, monkeypatch):
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
        assert faults.is_told_here(InputError("a fault"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_store_that_is_gone_leaves_nobody_silent(on_a_rank, monkeypatch):
    gone = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(gone.port))
    del gone
    monkeypatch.setattr(faults, "CONNECT_S", 0.2)
    assert faults.is_told_here(InputError("a fault"))

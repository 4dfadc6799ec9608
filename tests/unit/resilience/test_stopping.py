"""Each reason to stop: named, taken once, and the same for every rank."""

import os
import signal

import pytest

from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.config.train import TrainConfig
from megatron_ext.resilience import Stopping, StopRequest
from megatron_ext.runtime import Topology


@pytest.fixture(scope="module")
def topology():
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        yield topology


def test_nothing_asks(topology, tmp_path):
    with Stopping.watch(TrainConfig(train_steps=9, exit_duration=60), tmp_path, topology) as stopping:
        assert stopping.reason(1) is None


def test_exit_interval(topology, tmp_path):
    with Stopping.watch(TrainConfig(train_steps=9, exit_interval=3), tmp_path, topology) as stopping:
        assert [stopping.reason(step) for step in (2, 3)] == [None, "train.exit_interval 3"]


def test_exit_duration(topology, tmp_path):
    with Stopping.watch(TrainConfig(train_steps=9, exit_duration=0.0), tmp_path, topology) as stopping:
        assert stopping.reason(1) == "train.exit_duration 0 minutes"


def test_the_stop_file_is_obeyed_once(topology, tmp_path):
    with Stopping.watch(TrainConfig(train_steps=9), tmp_path, topology) as stopping:
        (tmp_path / "stop").touch()
        assert stopping.reason(1) == f"file {tmp_path / 'stop'}"
        assert not (tmp_path / "stop").exists()


def test_a_signal(topology, tmp_path):
    with Stopping.watch(TrainConfig(train_steps=9), tmp_path, topology) as stopping:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.reason(1) == "SIGTERM"


def test_a_signal_before_the_run_could_listen(topology, tmp_path):
    """Only where nothing else would have come of it: otherwise SIGTERM ends a start at once."""
    with StopRequest.where_ignored(signal.SIGTERM):
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with StopRequest.where_ignored(signal.SIGTERM) as early:
            os.kill(os.getpid(), signal.SIGTERM)
            with Stopping.watch(TrainConfig(train_steps=9), tmp_path, topology, early) as stopping:
                assert stopping.reason(1) == "SIGTERM"
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_all_ranks_stop_where_one_was_told(ranks, tmp_path):
    assert ranks.run(reasons, 2, tmp_path) == ["SIGTERM", "SIGTERM"]


def reasons(folder):
    """Rank 1 gets a signal."""
    with (
        Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology,
        Stopping.watch(TrainConfig(train_steps=9), folder, topology) as stopping,
    ):
        if topology.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return stopping.reason(1)

"""Profiled steps leave a trace that names what ran; the window is checked before the run starts."""

import gzip
import json

import pytest
import torch

from megatron_ext.config import InputError
from megatron_ext.config.observe import ObserveConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.observe import Run
from megatron_ext.runtime import Topology


@pytest.fixture(scope="module")
def topology():
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        yield topology


def profiled_sizes(topology, folder, steps, **section) -> list[int]:
    """Sizes of the square matrices multiplied in the trace, when step n multiplies n x n matrices."""
    observe = ObserveConfig(run_dir=str(folder), tensorboard=False, **section)
    with Run.open(observe, True, "{}") as run, run.profiler(topology) as profiler:
        for step in steps:
            with profiler.step(step):
                torch.randn(step, step) @ torch.randn(step, step)
    (trace,) = (folder / "profile").glob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return [event["args"]["Input Dims"][0][0] for event in events if event["name"] == "aten::mm"]


def test_the_window_is_profiled(topology, tmp_path):
    section = {"profile_step_start": 2, "profile_step_end": 4}
    assert profiled_sizes(topology, tmp_path, range(1, 6), **section) == [2, 3]


def test_one_step_without_an_end(topology, tmp_path):
    assert profiled_sizes(topology, tmp_path, range(1, 6), profile_step_start=3) == [3]


def test_a_run_that_ends_inside_the_window_keeps_its_trace(topology, tmp_path):
    section = {"profile_step_start": 2, "profile_step_end": 9}
    assert profiled_sizes(topology, tmp_path, range(1, 4), **section) == [2, 3]


def test_other_ranks_write_nothing(topology, tmp_path):
    observe = ObserveConfig(run_dir=str(tmp_path), tensorboard=False, profile_step_start=1, profile_ranks=(3,))
    with Run.open(observe, True, "{}") as run, run.profiler(topology) as profiler, profiler.step(1):
        pass
    assert not (tmp_path / "profile").exists()


def test_memory_history_without_a_gpu_is_refused(topology, tmp_path):
    section = {"profile_step_start": 1, "record_memory_history": True}
    observe = ObserveConfig(run_dir=str(tmp_path), tensorboard=False, **section)
    with Run.open(observe, True, "{}") as run, pytest.raises(InputError, match="no GPU"), run.profiler(topology):
        pass

"""Layouts that do not fit are refused by name; seeds depend on every part."""

import pytest
import torch

from megatron_ext.config import InputError
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.runtime import Topology, check_layout, derive_seed


@pytest.mark.parametrize(
    ("sizes", "world_size", "named"),
    [
        ({"tensor_model_parallel_size": 2}, 1, "tensor_model_parallel_size 2"),
        ({"context_parallel_size": 3}, 4, "context_parallel_size 3"),
        ({"tensor_model_parallel_size": 0}, 1, "tensor_model_parallel_size 0"),
        ({"sequence_parallel": True}, 2, "sequence_parallel"),
    ],
)
def test_refused(sizes, world_size, named):
    with pytest.raises(InputError, match=named):
        check_layout(ParallelConfig(**sizes), world_size)


def test_one_process_without_a_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        assert (topology.world_size, topology.data_parallel_size, topology.is_main) == (1, 1, True)
        assert topology.any(True) and not topology.any(False)
        assert topology.broadcast({"a": 1}) == {"a": 1}


def test_fp8_wants_a_gpu():
    with (
        pytest.raises(InputError, match="runtime.precision is fp8"),
        Topology.start(RuntimeConfig(device="cpu", precision="fp8"), ParallelConfig()),
    ):
        pass


def test_deterministic_asks_torch():
    try:
        with Topology.start(RuntimeConfig(device="cpu", deterministic=True), ParallelConfig()) as topology:
            assert topology.deterministic and torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_seeds_differ_in_every_part():
    parts = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (12, 3), (1, 23)]
    assert len({derive_seed(*part) for part in parts}) == len(parts)
    assert derive_seed(1, "a") == derive_seed(1, "a")

"""The table of CPU adaptations: applied once, to megatron-core only, and true to what it replaces."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

from megatron_ext.config import InputError
from megatron_ext.runtime import cpu
from megatron_ext.runtime.torch_proxy import TorchOnCpu, cuda_type_names

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is adapted")


@pytest.fixture(autouse=True)
def adapted():
    cpu.adapt_to_cpu()


def test_every_module_of_megatron_core_sees_the_stand_in():
    modules = [module for name, module in sys.modules.items() if name.startswith("megatron.core")]
    seen = [vars(module)["torch"] for module in modules if "torch" in vars(module)]
    seen = [module for module in seen if not module.__name__.startswith("megatron")]  # a package's submodule torch.py
    assert len(seen) > 50
    assert all(isinstance(module, TorchOnCpu) for module in seen)
    assert torch.cuda.current_device is not TorchOnCpu().cuda.current_device, "torch itself stays as it is"


def test_applying_twice_changes_nothing():
    rows = [row for row in cpu.TABLE[1:] if cpu.check_version() in row.upstream]
    before = [vars(owner)[name] for row in rows for owner, name in cpu._owners(row.symbol)]
    cpu.adapt_to_cpu()
    assert [vars(owner)[name] for row in rows for owner, name in cpu._owners(row.symbol)] == before


@pytest.mark.parametrize("row", cpu.TABLE, ids=lambda row: row.symbol)
def test_every_row_names_supported_versions_a_symbol_and_a_test(row):
    assert set(row.upstream) <= set(cpu.SUPPORTED)
    if row.symbol != "*.torch" and cpu.check_version() in row.upstream:
        assert all(name in vars(owner) for owner, name in cpu._owners(row.symbol))
    assert Path(row.test).is_file()


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99.0")
    with pytest.raises(InputError, match=r"0\.99\.0 is not supported.*0\.16\.1, 0\.19\.2"):
        cpu.check_version()


def test_factories_take_cuda_for_cpu():
    proxy = TorchOnCpu()
    assert proxy.zeros(2, device="cuda", pin_memory=True).device.type == "cpu"
    assert proxy.empty(1, device=proxy.cuda.current_device()).device.type == "cpu"
    assert proxy.nn is torch.nn


def test_type_names_are_cuda_only_inside():
    tensor = torch.zeros(1, dtype=torch.bfloat16)
    with cuda_type_names():
        assert tensor.type() == "torch.cuda.BFloat16Tensor"
    assert tensor.type() == "torch.BFloat16Tensor"


def test_the_tracker_keeps_two_streams_apart():
    """Oracle: two generators of torch, one per stream."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    tracker.reset()
    torch.manual_seed(1)
    tracker.add("model-parallel-rng", 2)
    outer, inner = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    for _ in range(3):
        assert torch.rand(4).equal(torch.rand(4, generator=outer))
        with tracker.fork():
            assert torch.rand(4).equal(torch.rand(4, generator=inner))


def test_recomputation_repeats_dropout():
    from megatron.core.tensor_parallel.random import checkpoint, get_cuda_rng_tracker

    get_cuda_rng_tracker().reset()
    get_cuda_rng_tracker().add("model-parallel-rng", 5)
    weight = torch.ones(64, requires_grad=True)

    def dropped(tensor):
        with get_cuda_rng_tracker().fork():
            return torch.nn.functional.dropout(tensor, 0.5)

    torch.manual_seed(3)
    output = checkpoint(dropped, False, weight)
    output.sum().backward()
    assert weight.grad.equal(output.detach()), "backward must see the mask that forward drew"

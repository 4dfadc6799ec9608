"""Bytes that a live training holds, by kind: the oracle of the plan's memory."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ext.config.model import ModelConfig
from megatron_ext.config.objective import ObjectiveConfig
from megatron_ext.config.optim import OptimConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.data.batch import Batch, Window, collate, slice_for_context
from megatron_ext.vocab import VocabLayout
from tests.support.distributed import use_next_store

SEQ_LENGTH = 256
LAYOUT = VocabLayout.custom(text_size=400, codebook_size=600)


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, for as long as they live."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {id(tensor.untyped_storage()) for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(id(storage))
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        return result

    def _gone(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.now -= size


def full_windows(micro_batch_size: int, seq_length: int = SEQ_LENGTH) -> Batch:
    """Windows of one segment each."""
    ids = np.arange(seq_length) % LAYOUT.size
    mask = np.ones(seq_length, dtype=bool)
    window = Window(ids=ids, labels=ids, mask=mask, boundaries=np.array([0, seq_length]))
    return collate([window] * micro_batch_size, [0] * micro_batch_size, "window")


def measure_all(cases: Sequence[tuple[dict[str, Any], dict[str, Any], str, int]]) -> list[dict[str, int]]:
    """`measure` of each case, one after the other on these ranks: starting them costs most."""
    found = []
    for case in cases:
        found.append(measure(*case))
        use_next_store()
    return found


def measure(parallel: dict[str, Any], model: dict[str, Any], precision: str, micro_batch_size: int) -> dict[str, int]:
    """Bytes by kind on this rank, after a training step of a decoder of the sections' fields."""
    from megatron_ext.model import build_model
    from megatron_ext.objectives import build_objective
    from megatron_ext.optim import build_optimizer
    from megatron_ext.runtime import Topology
    from megatron_ext.train.step import MicrobatchRunner

    layout = ParallelConfig(**parallel)
    with Topology.start(RuntimeConfig(device="cpu", precision=precision), layout) as topology:
        decoder = build_model(ModelConfig(**model), layout, LAYOUT, topology, seed=1)
        optimizer = build_optimizer(OptimConfig(), layout, decoder, topology, steps=10)
        batch = slice_for_context(
            full_windows(micro_batch_size), topology.context_parallel_rank, topology.context_parallel_size
        )
        runner = MicrobatchRunner(optimizer.model, build_objective(ObjectiveConfig(), LAYOUT), topology, seed=1)
        optimizer.zero_grad()
        runner.run([batch], ("a",), step=0)
        optimizer.step(1)  # AdamW's moments exist from its first step on
        weights = storages(decoder.parameters())
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor  # held: an address must not be used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            decoder.forward_batch(batch)
        activations = sum(storages(kept.values()).values())
        kept.clear()
        gradients = [parameter.main_grad for parameter in decoder.parameters()]
        with LiveBytes([*decoder.parameters(), *gradients]) as live:
            decoder.forward_batch(batch).sum().backward()
        return {
            "weights": sum(weights.values()),
            "gradients": sum(storages(gradients).values()),
            "optimizer": sum(size for address, size in _state(optimizer.inner).items() if address not in weights),
            "activations": activations,
            "microbatch": live.most,
        }


def measure_allocator(parallel: dict[str, Any], model: dict[str, Any], seq_length: int) -> tuple[int, int]:
    """Bytes of a GPU's allocator in bf16: between steps, and at most during one."""
    from megatron_ext.model import build_model
    from megatron_ext.objectives import build_objective
    from megatron_ext.optim import build_optimizer
    from megatron_ext.runtime import Topology
    from megatron_ext.train.step import MicrobatchRunner

    layout = ParallelConfig(**parallel)
    with Topology.start(RuntimeConfig(device="cuda", precision="bf16"), layout) as topology:
        decoder = build_model(ModelConfig(**model), layout, LAYOUT, topology, seed=1)
        optimizer = build_optimizer(OptimConfig(), layout, decoder, topology, steps=10)
        runner = MicrobatchRunner(optimizer.model, build_objective(ObjectiveConfig(), LAYOUT), topology, seed=1)
        for step in range(2):  # the first makes AdamW's moments and the libraries' workspaces
            optimizer.zero_grad()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            state = torch.cuda.memory_allocated()
            runner.run([full_windows(1, seq_length)], ("a",), step=step)
            optimizer.step(step + 1)
        return state, torch.cuda.max_memory_allocated()


def _state(inner: Any) -> dict[int, int]:
    """Storages of what torch's AdamW updates and remembers."""
    adam = inner.chained_optimizers[0].optimizer
    updated = [parameter for group in adam.param_groups for parameter in group["params"]]
    return storages(updated + [value for state in adam.state.values() for value in state.values()])


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address -> bytes; tensors that share memory count once."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}

"""The tiny decoder in training, with its checkpoints at hand: the subject of the checkpoint tests."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_ext.config.checkpoint import CheckpointConfig
from megatron_ext.config.objective import ObjectiveConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.data.batch import Window, collate, slice_for_context
from tests.support.decoding import GLOBAL_BATCH, LAYOUT, MODEL, OPTIM, full_weights, random_window
from tests.support.distributed import use_next_store
from tests.unit.data.samples import make_vocabulary, train_text_tokenizer


@dataclass(frozen=True)
class Training:
    """One rank's part of a training."""

    topology: Any
    optimizer: Any
    runner: Any
    checkpoint: Any

    def steps(self, first: int, last: int, *, blocks: int = 1) -> list[dict[str, float]]:
        """Optimizer steps first + 1 .. last; windows are `blocks` times the usual length."""
        history = []
        for step in range(first, last):
            batches = [
                collate([_window(step, index, blocks)], [index % 2], "document") for index in range(GLOBAL_BATCH)
            ]
            mine = batches[self.topology.data_parallel_rank :: self.topology.data_parallel_size]
            place = self.topology.context_parallel_rank, self.topology.context_parallel_size
            self.optimizer.zero_grad()
            losses = self.runner.run([slice_for_context(batch, *place) for batch in mine], ("a", "b"), step=step)
            history.append({**losses, "grad_norm": self.optimizer.step(step + 1).grad_norm})
        return history

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of this rank that a checkpoint holds: weights, master weights, moments."""
        (inner,) = self.optimizer.inner.chained_optimizers
        state = [inner.optimizer.state[p] for group in inner.optimizer.param_groups for p in group["params"]]
        masters = [p for group in inner.optimizer.param_groups for p in group["params"]]
        moments = [moment for entry in state for moment in (entry["exp_avg"], entry["exp_avg_sq"])]
        return [*self.checkpoint.model.parameters(), *masters, *moments]

    def copies(self) -> list[torch.Tensor]:
        """`tensors` as they are now."""
        return [tensor.detach().clone() for tensor in self.tensors()]

    def weights(self) -> dict[str, torch.Tensor]:
        """The full weights."""
        return full_weights(self.checkpoint.model, self.topology)


@contextlib.contextmanager
def training(
    folder: str | Path,
    parallel: dict[str, Any] | None = None,
    *,
    precision: str = "fp32",
    optim: dict[str, Any] | None = None,
    **section: Any,
) -> Iterator[Training]:
    """A fresh decoder on a layout, and its checkpoints in `folder`; `section` is section checkpoint, `optim` what
    differs from OPTIM."""
    from megatron_ext.checkpoint.decoder import DecoderCheckpoint
    from megatron_ext.model import build_model
    from megatron_ext.objectives import build_objective
    from megatron_ext.optim import build_optimizer
    from megatron_ext.runtime import Topology
    from megatron_ext.train.step import MicrobatchRunner

    layout = ParallelConfig(**(parallel or {}))
    with Topology.start(RuntimeConfig(device="cpu", precision=precision), layout) as topology:
        decoder = build_model(MODEL, layout, LAYOUT, topology, seed=7)
        optimizer = build_optimizer(dataclasses.replace(OPTIM, **(optim or {})), layout, decoder, topology, 10)
        runner = MicrobatchRunner(optimizer.model, build_objective(ObjectiveConfig(), LAYOUT), topology, seed=3)
        vocab = make_vocabulary(train_text_tokenizer())
        checkpoint = DecoderCheckpoint(
            CheckpointConfig(**section), Path(folder), optimizer, topology, vocab, {"data": "d"}, "{}\n"
        )
        yield Training(topology, optimizer, runner, checkpoint)
    use_next_store()


def _window(step: int, index: int, blocks: int) -> Window:
    """`blocks` usual windows as one."""
    parts = [random_window(100 * step + index + 50 * block) for block in range(blocks)]
    size = len(parts[0].ids)
    bounds = [block * size + part.boundaries[block > 0 :] for block, part in enumerate(parts)]
    joined = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "labels", "mask"))
    return Window(*joined, np.concatenate(bounds))

"""A tiny decoder on random packed documents: the subject of the layout tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_ext.config.checkpoint import CheckpointConfig
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.objective import ObjectiveConfig
from megatron_ext.config.optim import OptimConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.data.batch import Batch, Window, collate, slice_for_context
from megatron_ext.vocab import VocabLayout
from tests.support.distributed import use_next_store
from tests.unit.data.samples import make_vocabulary, train_text_tokenizer

SEQ_LENGTH = 32
GLOBAL_BATCH = 4
LAYOUT = VocabLayout.custom(text_size=40, codebook_size=60)
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=4, kv_channels=8,
    attention_dropout=0.0, hidden_dropout=0.0,
)  # fmt: skip
# A large eps: at 1e-8 AdamW turns the rounding noise of a vanishing gradient into steps of full size.
OPTIM = OptimConfig(lr=1e-2, lr_decay_style="constant", weight_decay=0.1, clip_grad=0.5, adam_eps=1e-4)


def random_window(seed: int, alignment: int = 8) -> Window:
    """Documents of random lengths, aligned, then padding; masks as the packer makes them."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, LAYOUT.size, SEQ_LENGTH)
    mask = np.zeros(SEQ_LENGTH, dtype=bool)
    bounds = [0]
    while bounds[-1] < SEQ_LENGTH:
        room = SEQ_LENGTH - bounds[-1]
        end = bounds[-1] + min(room, alignment * int(rng.integers(1, 4)))
        real = int(rng.integers(2, end - bounds[-1] + 1))
        mask[bounds[-1] : bounds[-1] + real - 1] = True
        bounds.append(end)
    return Window(ids=ids, labels=np.roll(ids, -1), mask=mask, boundaries=np.array(bounds))


def global_batch(step: int, micro_batch_size: int, scope: str) -> list[Batch]:
    """GLOBAL_BATCH windows in microbatches of `micro_batch_size`; windows come from two datasets."""
    windows = [(random_window(100 * step + index), index % 2) for index in range(GLOBAL_BATCH)]
    groups = [windows[first : first + micro_batch_size] for first in range(0, GLOBAL_BATCH, micro_batch_size)]
    return [collate(*zip(*group, strict=True), scope) for group in groups]


def train_losses(
    parallel: dict[str, Any],
    *,
    steps: int = 4,
    scope: str = "document",
    model: dict[str, Any] | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    micro_batch_size: int = 1,
    folder: str | None = None,
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Train to step `steps`; returns losses and gradient norm of each step, and the full weights at the end.

    With `folder`, go on from the checkpoint there, if any, and leave one.
    """
    from megatron_ext.model import build_model
    from megatron_ext.objectives import build_objective
    from megatron_ext.optim import build_optimizer
    from megatron_ext.runtime import Topology
    from megatron_ext.train.step import MicrobatchRunner

    layout = ParallelConfig(**parallel)
    with Topology.start(RuntimeConfig(device=device, precision=precision), layout) as topology:
        decoder = build_model(ModelConfig(**{**vars(MODEL), **(model or {})}), layout, LAYOUT, topology, seed=7)
        optimizer = build_optimizer(OPTIM, layout, decoder, topology, steps)
        runner = MicrobatchRunner(optimizer.model, build_objective(ObjectiveConfig(), LAYOUT), topology, seed=3)
        checkpoint = _checkpoint(folder, optimizer, topology) if folder else None
        state = checkpoint.load_latest() if checkpoint else None
        history = []
        for step in range(state["step"] if state else 0, steps):
            mine = global_batch(step, micro_batch_size, scope)[
                topology.data_parallel_rank :: topology.data_parallel_size
            ]
            mine = [slice_for_context(b, topology.context_parallel_rank, topology.context_parallel_size) for b in mine]
            optimizer.zero_grad()
            losses = runner.run(mine, ("a", "b"), step=step)
            history.append({**losses, "grad_norm": optimizer.step(step + 1).grad_norm})
        if checkpoint:
            checkpoint.save(steps, {"step": steps})
        return history, full_weights(decoder, topology)


def walk(cases: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[list[dict[str, float]], dict]]:
    """`train_losses` of each (parallel, options), one after the other in the same processes: starting them costs
    most."""
    results = []
    for parallel, options in cases:
        results.append(train_losses(parallel, **options))
        use_next_store()
    return results


def _checkpoint(folder: str, optimizer: Any, topology: Any) -> Any:
    from megatron_ext.checkpoint.decoder import DecoderCheckpoint

    vocab = make_vocabulary(train_text_tokenizer())
    return DecoderCheckpoint(CheckpointConfig(), Path(folder), optimizer, topology, vocab, {}, "{}\n")


def full_weights(decoder: torch.nn.Module, topology: Any) -> dict[str, torch.Tensor]:
    """Every parameter, gathered over the tensor axis (gate and up halves of the MLP are put back together)."""
    import torch.distributed as dist

    weights = {}
    for name, parameter in decoder.named_parameters():
        parts = [parameter.detach().clone()]
        if getattr(parameter, "tensor_model_parallel", False) and topology.tensor_parallel_size > 1:
            parts = [torch.empty_like(parameter) for _ in range(topology.tensor_parallel_size)]
            dist.all_gather(parts, parameter.detach().contiguous(), group=topology.groups.tp)
        dim = getattr(parameter, "partition_dim", 0) if len(parts) > 1 else 0
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert not any(torch.cat(parts)[LAYOUT.size :].flatten()), "padded rows must stay zero"
            weights[name] = torch.cat(parts)[: LAYOUT.size]
        elif len(parts) > 1 and "linear_fc1" in name:
            halves = [part.chunk(2) for part in parts]
            weights[name] = torch.cat([half[0] for half in halves] + [half[1] for half in halves])
        else:
            weights[name] = torch.cat(parts, dim=dim)
    return {name: weight.cpu() for name, weight in weights.items()}

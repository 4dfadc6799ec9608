"""A tiny decoder trained on packed documents, on any layout: the subject of the distributed tests."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
DATASETS = ("a", "b")
LAYOUT = VocabLayout.custom(text_size=40, codebook_size=60)
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=4, kv_channels=8,
    attention_dropout=0.0, hidden_dropout=0.0,
)  # fmt: skip
# A large eps: at 1e-8 AdamW turns the rounding noise of a vanishing gradient into steps of full size.
OPTIM = OptimConfig(lr=1e-2, lr_decay_style="constant", weight_decay=0.1, clip_grad=0.5, adam_eps=1e-4)

History = list[dict[str, float]]
"""Losses and gradient norm of each step."""

Weights = dict[str, torch.Tensor]


def random_window(seed: int, alignment: int = 8, num_ids: int = LAYOUT.size) -> Window:
    """Documents of random lengths, aligned, then padding; masks as the packer makes them."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, num_ids, SEQ_LENGTH)
    mask = np.zeros(SEQ_LENGTH, dtype=bool)
    bounds = [0]
    while bounds[-1] < SEQ_LENGTH:
        room = SEQ_LENGTH - bounds[-1]
        end = bounds[-1] + min(room, alignment * int(rng.integers(1, 4)))
        real = int(rng.integers(2, end - bounds[-1] + 1))
        mask[bounds[-1] : bounds[-1] + real - 1] = True
        bounds.append(end)
    return Window(ids=ids, labels=np.roll(ids, -1), mask=mask, boundaries=np.array(bounds))


def random_windows(step: int, count: int = GLOBAL_BATCH, num_ids: int = LAYOUT.size) -> list[Window]:
    """A global batch of windows that no other step sees."""
    return [random_window(100 * step + index, num_ids=num_ids) for index in range(count)]


def rows(windows: Sequence[Window], micro_batch_size: int, scope: str) -> list[Batch]:
    """The windows of a global batch in microbatches; they come from two datasets in turn."""
    groups = [
        range(first, min(first + micro_batch_size, len(windows))) for first in range(0, len(windows), micro_batch_size)
    ]
    return [collate([windows[i] for i in group], [i % len(DATASETS) for i in group], scope) for group in groups]


def global_batch(step: int, micro_batch_size: int, scope: str) -> list[Batch]:
    """`rows` of GLOBAL_BATCH random windows."""
    return rows(random_windows(step), micro_batch_size, scope)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained: everything but the layout. It travels to the ranks, so it must pickle."""

    steps: int = 4
    """Optimizer steps in all, with those of the checkpoint that it goes on from."""

    windows: Callable[[int], list[Window]] = random_windows
    """Step (0-based) -> the windows of its global batch."""

    micro_batch_size: int = 1
    scope: str = "document"
    layout: VocabLayout = LAYOUT
    model: Mapping[str, Any] = field(default_factory=dict)
    """Changes of MODEL."""

    optim: Mapping[str, Any] = field(default_factory=dict)
    """Changes of OPTIM."""

    vision_loss_weight: float = 0.5
    precision: str = "fp32"
    device: str = "cpu"

    folder: str | None = None
    """Go on from the checkpoint there, if any, and leave one at the end."""

    begin_with: str | None = None
    """Go on from the checkpoint there instead; it stays as it is."""


@dataclass(frozen=True)
class Rank:
    """One rank of a training in progress."""

    training: Training
    topology: Any
    decoder: Any
    optimizer: Any
    runner: Any

    def microbatches(self, step: int) -> list[Batch]:
        """This rank's share of the global batch of `step`."""
        topology = self.topology
        whole = rows(self.training.windows(step), self.training.micro_batch_size, self.training.scope)
        mine = whole[topology.data_parallel_rank :: topology.data_parallel_size]
        return [slice_for_context(b, topology.context_parallel_rank, topology.context_parallel_size) for b in mine]

    def backward(self, step: int) -> dict[str, float]:
        """Losses of the global batch; the gradient buffers hold its gradient afterwards."""
        self.optimizer.zero_grad()
        return self.runner.run(self.microbatches(step), DATASETS, step=step)

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step: its losses, gradient norm and the norm's parts."""
        losses = self.backward(step)
        grad_norm = self.optimizer.gradient_norm()
        parts = {f"grad_norm/{group}": norm for group, norm in self.optimizer.groups.norms().items()}
        self.optimizer.apply(step + 1, grad_norm)
        return {**losses, "grad_norm": grad_norm, **parts}


@contextlib.contextmanager
def start(parallel: Mapping[str, Any], training: Training) -> Iterator[Rank]:
    """Join the other ranks and build the decoder and its optimizer; weights are a function of the seed alone."""
    from megatron_ext.model import build_model
    from megatron_ext.objectives import build_objective
    from megatron_ext.optim import build_optimizer
    from megatron_ext.runtime import Topology
    from megatron_ext.train.step import MicrobatchRunner

    layout = ParallelConfig(**parallel)
    # One thread: matrices this small gain nothing from more, and lose much where other tests want the cores.
    runtime = RuntimeConfig(device=training.device, precision=training.precision, num_threads=1)
    with Topology.start(runtime, layout) as topology:
        decoder = build_model(
            ModelConfig(**{**vars(MODEL), **training.model}), layout, training.layout, topology, seed=7
        )
        optim = OptimConfig(**{**vars(OPTIM), **training.optim})
        optimizer = build_optimizer(optim, layout, decoder, topology, training.steps)
        objective = build_objective(ObjectiveConfig(vision_loss_weight=training.vision_loss_weight), training.layout)
        runner = MicrobatchRunner(optimizer.model, objective, topology, seed=3)
        yield Rank(training, topology, decoder, optimizer, runner)


def train_losses(parallel: Mapping[str, Any], **options: Any) -> tuple[History, Weights]:
    """Train as `Training(**options)` says; returns losses and gradient norm of each step, and the full weights at the
    end."""
    training = Training(**options)
    with start(parallel, training) as rank:
        if "bucket_size" in parallel:
            assert_several_padded(rank.optimizer)
        source = training.begin_with or training.folder
        state = checkpoint_in(source, rank).load_latest() if source else None
        history = [rank.step(step) for step in range(state["step"] if state else 0, training.steps)]
        if training.folder:
            checkpoint_in(training.folder, rank).save(training.steps, {"step": training.steps})
        rank.optimizer.gather_weights()
        return history, full_weights(rank.decoder, rank.topology)


def assert_several_padded(optimizer: Any) -> None:
    """A single gradient bucket, or none that is padded before the last, shows nothing of how buckets are saved."""
    from megatron_ext.optim import gradient_buckets

    buckets = gradient_buckets(optimizer.model)
    assert len(buckets) >= 3 and sum(bucket.padded > bucket.elements for bucket in buckets[:-1]) >= 2, buckets


def walk(cases: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[History, Weights]]:
    """`train_losses` of each (parallel, options), one after the other in the same processes: starting them costs
    most."""
    results = []
    for parallel, options in cases:
        results.append(train_losses(parallel, **options))
        use_next_store()
    return results


@functools.cache
def _vocabulary() -> Any:
    return make_vocabulary(train_text_tokenizer())


def checkpoint_in(folder: str, rank: Rank) -> Any:
    """The checkpoint of this training in `folder`."""
    from megatron_ext.checkpoint.decoder import DecoderCheckpoint

    return DecoderCheckpoint(CheckpointConfig(), Path(folder), rank.optimizer, rank.topology, _vocabulary(), {}, "{}\n")


def full_weights(decoder: Any, topology: Any) -> Weights:
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
            num_ids = decoder.layout.size
            assert not torch.cat(parts)[num_ids:].any(), "padded rows must stay zero"
            weights[name] = torch.cat(parts)[:num_ids]
        elif len(parts) > 1 and "linear_fc1" in name:
            halves = [part.chunk(2) for part in parts]
            weights[name] = torch.cat([half[0] for half in halves] + [half[1] for half in halves])
        else:
            weights[name] = torch.cat(parts, dim=dim)
    return {name: weight.cpu() for name, weight in weights.items()}

"""Whether a layout trains as one process does, on the machines that are to train in it.

A narrowed decoder is trained twice from the same weights on the same random documents: by every rank alone, then by all
ranks in the layout. Each rank compares the layout with what it computed itself, so no rank waits for another's
reference, and a device that computes wrongly is seen too, by the rank that owns it.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from megatron_ext.config.errors import InputError
from megatron_ext.config.optim import OptimConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.run import RunConfig
from megatron_ext.config.validate import validate
from megatron_ext.data import Loader, RandomDocuments
from megatron_ext.model import Emu3Model, build_model
from megatron_ext.model.initialize import VOCABULARY, shard
from megatron_ext.objectives import build_objective
from megatron_ext.observe.progress import progress
from megatron_ext.optim import Bucket, build_optimizer, gradient_buckets
from megatron_ext.plan import DecoderShape
from megatron_ext.runtime import Topology, check_layout
from megatron_ext.train.step import MicrobatchRunner
from megatron_ext.vocab import VocabLayout

TOKENS_PER_RANK = 64
"""Ids of a window that each rank keeps at least, where the user's windows have as many."""

WIDTH = 128
"""Of the narrowed decoder, at most."""


@dataclass(frozen=True)
class Bounds:
    """Largest relative differences that rounding explains."""

    losses: float
    grad_norm: float
    weights: float


# Measured on CPU, both attention scopes, one and two windows a row, with and without QK norm. fp32, over TP, TP + SP,
# CP 2, DP 2 and their pairs on 4 ranks: 2.4e-7, 3.4e-6, 8.1e-6. bf16, over all on 2 ranks: 8.5e-4, 4.7e-2, 6.9e-2.
BOUNDS = {
    "fp32": Bounds(losses=1e-5, grad_norm=3e-5, weights=5e-5),
    "bf16": Bounds(losses=3e-3, grad_norm=1.5e-1, weights=2e-1),
}


@dataclass(frozen=True)
class Comparison:
    """One quantity in the layout and in one process."""

    quantity: str
    difference: float
    """Relative, the largest of all steps and ranks; of weights: relative to how far training moved them."""

    bound: float
    place: str
    """Where the difference is largest: step or parameter, and rank."""

    @property
    def agrees(self) -> bool:
        """Whether rounding explains the difference."""
        return self.difference <= self.bound


@dataclass(frozen=True)
class Verification:
    """What was compared, and how it came out; the same on every rank."""

    config: RunConfig
    """The narrowed configuration that was trained."""

    device: str
    buckets: tuple[Bucket, ...]
    """In which gradients were reduced."""

    comparisons: list[Comparison]

    @property
    def disagreements(self) -> list[Comparison]:
        """What rounding does not explain."""
        return [comparison for comparison in self.comparisons if not comparison.agrees]


@dataclass(frozen=True)
class Trajectory:
    """One training: what it measured, and this rank's parameters."""

    history: list[dict[str, float]]
    """Losses and gradient norm of each step."""

    initial: dict[str, Tensor]
    final: dict[str, Tensor]
    """Parameters as this rank holds them, fp32 on the CPU."""

    decoder: Emu3Model
    buckets: tuple[Bucket, ...]


def narrow(config: RunConfig, world_size: int, steps: int) -> RunConfig:
    """The configuration with few and narrow layers, short windows and small batches.

    Kept: the layout and everything else of `parallel`, `runtime`, `vocab`, `objective` and `data`; the heads' width and
    grouping; gradient accumulation and rows of several windows, where there are any. Gradients that are reduced in
    buckets still are, in many, some padded. Dropout is off, since its masks belong to ranks, and the learning rate
    constant and large, so that a wrong gradient shows in the weights.
    """
    shape, parallel = DecoderShape.of(config.model), config.parallel
    tensor = parallel.tensor_model_parallel_size
    exchanged = parallel.context_parallel_size if "a2a" in parallel.cp_comm_type else 1  # heads change ranks there
    groups = _fewer(shape.num_query_groups, tensor * exchanged, 2)
    layers = min(shape.num_layers, 2)
    if parallel.recompute_num_layers is not None:
        recomputed = min(parallel.recompute_num_layers, layers)
        parallel = dataclasses.replace(parallel, recompute_num_layers=recomputed)
    width = WIDTH
    if parallel.overlap_grad_reduce:  # a bucket for each parameter; those of the norms are padded to 128
        parallel, width = dataclasses.replace(parallel, bucket_size=1), 3 * WIDTH // 4
    model = dataclasses.replace(
        config.model,
        num_layers=layers,
        hidden_size=min(shape.hidden_size, width),
        ffn_hidden_size=_fewer(shape.ffn_hidden_size, tensor, WIDTH),
        num_query_groups=groups,
        num_attention_heads=groups * min(shape.num_attention_heads // shape.num_query_groups, 2),
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    micro = min(config.train.micro_batch_size, 2)
    ranks = max(1, world_size // (tensor * parallel.context_parallel_size))
    accumulated = config.train.global_batch_size // (config.train.micro_batch_size * ranks)
    train = dataclasses.replace(
        config.train, micro_batch_size=micro, global_batch_size=micro * ranks * min(accumulated, 2), train_steps=steps
    )
    narrowed = dataclasses.replace(config, parallel=parallel, model=model, train=train, optim=_sensitive(config.optim))
    return _shorten(narrowed, world_size)


def _fewer(size: int, ranks: int, most: int) -> int:
    """`size` cut down to `most` per rank; left alone where it does not divide, for build_model to refuse by name."""
    return size if size % ranks else ranks * min(size // ranks, most)


def _sensitive(optim: OptimConfig) -> OptimConfig:
    """AdamW that moves weights visibly in a few steps. With eps 1e-8 the update of a weight whose gradient is nearly
    zero would be the sign of rounding noise, at full size."""
    return dataclasses.replace(
        optim, lr=1e-2, adam_eps=1e-4, lr_warmup_steps=0, lr_decay_style="constant", lr_decay_steps=None
    )


def _shorten(config: RunConfig, world_size: int) -> RunConfig:
    """Halve the windows while every rule of a configuration still holds and every rank keeps enough of them."""
    parallel = config.parallel
    least = TOKENS_PER_RANK * parallel.context_parallel_size * parallel.tensor_model_parallel_size
    while config.train.seq_length % 2 == 0 and config.train.seq_length // 2 >= least:
        train = dataclasses.replace(config.train, seq_length=config.train.seq_length // 2)
        shorter = dataclasses.replace(config, train=train)
        try:
            validate(shorter, world_size)
        except InputError:
            break
        config = shorter
    return config


def verify(config: RunConfig, world_size: int, steps: int, layout: VocabLayout, console: Console) -> Verification:
    """Train the narrowed configuration alone and in its layout, and compare. Every rank calls this.

    Raises:
        InputError: a precision whose rounding is too coarse to compare, or a layout that cannot be.
    """
    if config.runtime.precision not in (*BOUNDS, "auto"):
        raise InputError(
            f"runtime.precision {config.runtime.precision} rounds so coarsely that a wrong layout would not show: "
            "verify with --runtime.precision bf16, the layout is the same"
        )
    check_layout(config.parallel, world_size)
    if config.runtime.precision == "auto":  # rank 0 settles it, for the process alone as well
        with Topology.start(config.runtime, config.parallel) as topology:
            config = config.computing_in(topology.precision.name)
    small = narrow(config, world_size, steps)
    with Topology.alone(small.runtime) as topology:
        plain = dataclasses.replace(small, parallel=ParallelConfig())
        reference = _train(plain, layout, topology, "one process", console)
    with Topology.start(small.runtime, small.parallel) as topology:
        mine = _train(small, layout, topology, "this layout", console)
        found = _differences(mine, reference) | {"weights": _weights_differ(mine, reference, topology)}
        dropping = _with_dropout(small, config)
        if dropping != small:
            mine = _train(dropping, layout, topology, "with dropout", console)
        found["replicas"] = _replicas_differ(mine, topology)
        bounds = BOUNDS[config.runtime.precision]
        return Verification(small, topology.device.type, mine.buckets, _worst(found, bounds, topology))


def _with_dropout(small: RunConfig, config: RunConfig) -> RunConfig:
    """The narrowed configuration with the user's dropout, under which ranks agree only if their seeds do."""
    shape = DecoderShape.of(config.model)
    model = dataclasses.replace(
        small.model, attention_dropout=shape.attention_dropout, hidden_dropout=shape.hidden_dropout
    )
    return dataclasses.replace(small, model=model)


def _train(config: RunConfig, layout: VocabLayout, topology: Topology, label: str, console: Console) -> Trajectory:
    train = config.train
    decoder = build_model(config.model, config.parallel, layout, topology, train.seed)
    optimizer = build_optimizer(config.optim, config.parallel, decoder, topology, train.train_steps)
    runner = MicrobatchRunner(optimizer.model, build_objective(config.objective, layout), topology, seed=train.seed)
    documents = RandomDocuments(
        name="random", layout=layout, seq_length=train.seq_length, alignment=config.data.document_alignment,
        seed=train.seed,
    )  # fmt: skip
    loader = Loader([documents], [1.0], attention_scope=config.data.attention_scope, train=train, topology=topology)
    initial, history = _weights(decoder), []
    with progress(label, train.train_steps, "steps", console) as advance:
        for step in range(train.train_steps):
            optimizer.zero_grad()
            losses = runner.run(loader.microbatches(step * train.global_batch_size), loader.dataset_names, step=step)
            history.append({**losses, "grad_norm": optimizer.step(step + 1).grad_norm})
            advance(1)
    optimizer.gather_weights()
    return Trajectory(history, initial, _weights(decoder), decoder, gradient_buckets(optimizer.model))


def _weights(decoder: Emu3Model) -> dict[str, Tensor]:
    return {name: parameter.detach().float().cpu().clone() for name, parameter in decoder.named_parameters()}


def _differences(mine: Trajectory, reference: Trajectory) -> dict[str, tuple[float, str]]:
    """Of every loss and the gradient norm: the largest relative difference, and its step."""
    found = {}
    for name in mine.history[0]:
        by_step = [_relative(m[name], r[name]) for m, r in zip(mine.history, reference.history, strict=True)]
        found[name] = max(by_step), f"step {by_step.index(max(by_step)) + 1}"
    return found


def _relative(value: float, expected: float) -> float:
    """Not-a-number is a loss without tokens: it must be one in both trainings."""
    if math.isfinite(value) and math.isfinite(expected):
        return abs(value - expected) / max(abs(expected), 1e-30)
    return 0.0 if math.isnan(value) and math.isnan(expected) else math.inf


def _weights_differ(mine: Trajectory, reference: Trajectory, topology: Topology) -> tuple[float, str]:
    """Against this rank's part of the reference, by norm, relative to how far training moved that part."""
    differences = {}
    for name, parameter in mine.decoder.named_parameters():
        start, expected = (
            _own_part(name, whole[name], parameter, topology) for whole in (reference.initial, reference.final)
        )
        # Less one rounding of the stored type: a bf16 norm at 1 moves in steps of 0.004.
        resolution = torch.finfo(topology.dtype).eps * expected.abs()
        differences[name] = _share(F.relu((mine.final[name] - expected).abs() - resolution), expected - start)
    name = max(differences, key=differences.__getitem__)
    return differences[name], name


def _own_part(name: str, whole: Tensor, parameter: Tensor, topology: Topology) -> Tensor:
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    size = topology.tensor_parallel_size
    if name in VOCABULARY:  # padded to more rows, all zero, the more tensor ranks there are
        whole = F.pad(whole, (0, 0, 0, size * parameter.shape[0] - whole.shape[0]))
    return shard(whole, name, parameter.partition_dim, topology.tensor_parallel_rank, size)


def _replicas_differ(mine: Trajectory, topology: Topology) -> tuple[float, str]:
    """Weights that several ranks hold, between them, relative to how far training moved them."""
    differences = {}
    for name, parameter in mine.decoder.named_parameters():
        sharded = getattr(parameter, "tensor_model_parallel", False)
        extremes = torch.stack((parameter.detach().float(), -parameter.detach().float()))
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=topology.groups.dp_cp if sharded else None)
        differences[name] = _share(extremes.sum(0).cpu(), mine.final[name] - mine.initial[name])
    name = max(differences, key=differences.__getitem__)
    return differences[name], name


def _share(difference: Tensor, moved: Tensor) -> float:
    """|difference| / |moved|; where nothing moved (padding), nothing may differ."""
    off, way = difference.norm().item(), moved.norm().item()
    return off / way if way else (0.0 if off == 0 else math.inf)


def _worst(found: dict[str, tuple[float, str]], bounds: Bounds, topology: Topology) -> list[Comparison]:
    """The largest difference of all ranks, the same on each."""
    everywhere: list = [None] * topology.world_size
    dist.all_gather_object(everywhere, found)
    limits = {"grad_norm": bounds.grad_norm, "weights": bounds.weights, "replicas": bounds.weights}
    comparisons = []
    for name in found:
        by_rank = [differences[name][0] for differences in everywhere]
        rank = by_rank.index(max(by_rank))
        place = f"{everywhere[rank][name][1]}, rank {rank}" if by_rank[rank] else ""
        comparisons.append(Comparison(name, by_rank[rank], limits.get(name, bounds.losses), place))
    return comparisons

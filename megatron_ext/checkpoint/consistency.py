"""Whether a checkpoint contradicts itself: its fp32 master weights, rounded, must be its weights.

Both are on their way to disk, or come from it, through code that cuts and joins them differently. What one of them
loses on the way, the other shows.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

PIECE = 1 << 24
"""Elements that are compared at a time: what the rounded copies need is small beside any checkpoint."""


def contradiction(module: nn.Module, optimizer: DistributedOptimizer, state: Mapping[str, Any]) -> str | None:
    """How the master weights in `state` contradict the weights of `module`, in words; None where they do not.

    `state` is the optimizer's sharded state: about to be written, or read and not yet loaded.
    """
    names = {weight: name for name, weight in module.named_parameters()}
    wrong = {}
    for weight, begin, master in _masters(optimizer, state):
        differing = unlike(master, weight.detach().view(-1)[begin : begin + master.numel()])
        if differing:
            wrong[names[weight]] = wrong.get(names[weight], 0) + differing
    if not wrong:
        return None
    name, count = next(iter(wrong.items()))
    more = f" and in {len(wrong) - 1} others" if len(wrong) > 1 else ""
    return f"master weights do not round to the weights: {count:,} elements of {name}{more}"


def unlike(master: Tensor, weight: Tensor) -> int:
    """Elements of `weight` that are not those of `master` in its type; not-a-number is like itself."""
    count = 0
    for exact, rounded in zip(master.flatten().split(PIECE), weight.flatten().split(PIECE), strict=True):
        found = exact.detach().to(rounded.dtype).to(rounded.device)
        if not torch.equal(found, rounded):
            count += int(((found != rounded) & ~(found.isnan() & rounded.isnan())).sum())
    return count


def _masters(optimizer: DistributedOptimizer, state: Mapping[str, Any]) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
    """(weight, where in it, master weights from there on) of all that this rank saves or loads."""
    saved = state.get("param_state")
    if saved is None:  # gathered on another rank
        return
    # `data` is a tensor's own, and what megatron-core's ShardedTensor holds.
    if state["param_state_sharding_type"] == "fully_reshardable":  # whole weights, numbered
        weights = [weight for buffer in optimizer.buffers for weight in buffer.param_index_map]
        for number, weight in enumerate(weights):
            yield weight, 0, saved[number]["param"].data
        return
    for number, ranges in enumerate(optimizer.gbuf_ranges):  # this rank's parts of weights, and what lies between them
        for dtype, buckets in ranges.items():
            for bucket, entries in zip(buckets, saved[number][dtype], strict=True):
                parts = _without_padding(entries)
                for (weight, places), part in zip(bucket["param_map"].items(), parts, strict=True):
                    yield weight, places["param"].start, part["param"].data


def _without_padding(entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [entry for entry in entries if not getattr(entry["padding"], "obj", entry["padding"])]

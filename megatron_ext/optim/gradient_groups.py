"""Gradient norms by kind of weight: where in the decoder a norm that grows comes from.

With the distributed optimizer every rank holds a piece of the gradient's sum over data and context ranks, and tensor
ranks hold pieces of the sharded matrices. Sums of squares are therefore added over all ranks, in one reduction, with
each weight counted once: of those that every tensor rank holds whole, only tensor rank 0's pieces count. This is what
megatron-core does for the norm of all (optimizer/optimizer.py, get_main_grads_for_grad_norm).
"""

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_ext.runtime import Topology

GROUPS = ("embedding", "attention", "mlp", "norms", "head")


def group_of(name: str) -> str:
    """Which of GROUPS a weight belongs to, by its name in the decoder.

    Raises:
        ValueError: none of them.
    """
    if "norm" in name:
        return "norms"
    for part, group in (
        ("embedding.", "embedding"), ("self_attention.", "attention"), ("mlp.", "mlp"), ("output_layer.", "head"),
    ):  # fmt: skip
        if part in name:
            return group
    raise ValueError(f"weight {name} belongs to none of {', '.join(GROUPS)}: say in group_of which it is")


class GradientGroups:
    """Knows which pieces of the gradient on this rank are of which group."""

    def __init__(self, model: DistributedDataParallel, inner: MegatronOptimizer, topology: Topology) -> None:
        self._device = topology.device
        self._reduced_over = inner.get_grad_stats_parallel_group()
        self._pieces: dict[str, list[Tensor]] = {group: [] for group in GROUPS}
        for name, weight in model.module.named_parameters():
            if not getattr(weight, "tensor_model_parallel", False) and topology.tensor_parallel_rank > 0:
                continue
            for optimizer in inner.chained_optimizers:
                place = optimizer.model_param_group_index_map.get(weight)
                if place is not None:  # a piece of it is on this rank
                    group, order = place
                    self._pieces[group_of(name)].append(optimizer.optimizer.param_groups[group]["params"][order])

    @torch.no_grad()
    def norms(self) -> dict[str, float]:
        """Norm of each group's finalized gradient, before clipping; the same on every rank. Every rank must call."""
        sums = torch.zeros(len(GROUPS), dtype=torch.float64, device=self._device)
        for number, pieces in enumerate(self._pieces.values()):
            gradients = [piece.grad for piece in pieces if piece.grad is not None]
            if gradients:
                sums[number] = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        dist.all_reduce(sums, group=self._reduced_over)
        return dict(zip(GROUPS, sums.sqrt().tolist(), strict=True))

"""Silent errors: ranks that should hold the same weights, compared by checksum.

A flipped bit on one data rank changes no loss that anybody would notice, and the next gather of the weights spreads it.
P = parameters, R = ranks of a group.
"""

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ext.optim import Optimizer
from megatron_ext.runtime import Topology

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """Sum of the tensor's bit patterns as integers, int64 modulo 2^64: any single changed element changes it."""
    return tensor.detach().contiguous().view(BITS[tensor.element_size()]).sum(dtype=torch.int64)


def differing_replicas(module: nn.Module, topology: Topology) -> list[str]:
    """`rank R: NAME` of every weight that is not what most of its replicas are; the same list on every rank.

    Over data and context ranks every weight is replicated, over tensor ranks those that are not sharded.
    """
    groups = topology.groups
    whole = dict(module.named_parameters())
    unsharded = {name: weight for name, weight in whole.items() if not getattr(weight, "tensor_model_parallel", False)}
    mine = sorted({*_differing(whole, groups.dp_cp, topology.rank), *_differing(unsharded, groups.tp, topology.rank)})
    gathered = topology.gather([f"rank {topology.rank}: {name}" for name in mine])
    return topology.broadcast(sorted(sum(gathered, [])) if gathered is not None else None)


def unlike_masters(optimizer: Optimizer, topology: Topology) -> list[str]:
    """`rank R: what` where this rank's optimizer state is not finite, or its fp32 master weights do not round to the
    weights; the same list on every rank."""
    mine = []
    for inner in optimizer.inner.chained_optimizers:
        pairs = zip(inner.shard_float16_groups, inner.shard_fp32_from_float16_groups, strict=True)
        for weights, masters in pairs:
            for weight, master in zip(weights, masters, strict=True):
                if not torch.equal(master.to(weight.dtype), weight):
                    mine.append(f"rank {topology.rank}: master weights of a shard of {weight.numel():,}")
        for state in inner.optimizer.state.values():
            for name, moment in state.items():
                if isinstance(moment, Tensor) and not torch.isfinite(moment).all():
                    mine.append(f"rank {topology.rank}: {name} of a shard of {moment.numel():,} is not finite")
    gathered = topology.gather(mine)
    return topology.broadcast(sum(gathered, []) if gathered is not None else None)


def _differing(weights: dict[str, nn.Parameter], group: dist.ProcessGroup, rank: int) -> list[str]:
    """Names of the weights in which this rank is not like most of `group`; the lowest ranks win a tie."""
    if group.size() == 1 or not weights:
        return []
    mine_P = torch.stack([checksum(weight) for weight in weights.values()])
    gathered = [torch.empty_like(mine_P) for _ in range(group.size())]
    dist.all_gather(gathered, mine_P, group=group)
    by_weight = torch.stack(gathered).T.tolist()
    return [
        name
        for name, own, all_R in zip(weights, mine_P.tolist(), by_weight, strict=True)
        if own != Counter(all_R).most_common(1)[0][0]
    ]

"""The ranks that train copies of the same networks: gradients, batch norms and metrics as of one batch.

A global batch is divided over the ranks in equal parts. Every loss is a mean over samples, so the mean of the ranks'
gradients, which torch's DDP takes, is the gradient of the whole batch; only the batch norms look at several samples at
once, and here they see those of all ranks.

Gradient accumulation is another matter: the networks see one micro-batch (of all ranks) after the other, and the batch
norms normalise by the statistics of each. That is another function of the batch than one pass over all of it, by
definition; networks without batch norms, or with frozen ones, give the same gradients either way.

Shapes: B batch, C channels, ... any further axes; R ranks.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megatron_ext.runtime import Topology

BUFFERS_STAY = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")  # since torch 2.13; before
    if name in inspect.signature(DistributedDataParallel).parameters
)
"""DDP's option that would copy rank 0's buffers at every call: the statistics of the batch norms are equal on all ranks
anyway, and the copying, in place, forbids a second call before the backward pass."""


class Replicas:
    """This rank's copy among all. One rank by itself: nothing is wrapped, replaced or sent."""

    def __init__(self, topology: Topology) -> None:
        self._group = topology.groups.dp
        self.rank = topology.data_parallel_rank
        self.count = topology.data_parallel_size

    def join_batch_norms(self, network: nn.Module) -> None:
        """Let the batch norms of `network` take their statistics over the batches of all ranks."""
        if self.count > 1:
            replace_batch_norms(network, self._group)

    def call(self, network: nn.Module, function: Callable[..., Any], *, may_skip: bool = False) -> Callable[..., Any]:
        """`function` as a call after whose backward pass every gradient of `network` is the mean over the ranks.

        `function` uses `network` and returns every tensor through which gradients come back (also inside of tuples,
        dictionaries and dataclasses). It may be called several times before the backward pass. With `may_skip` it need
        not use all weights each time, as before the codebook is in use. The weights become those of rank 0.
        """
        if self.count == 1:
            return function
        return DistributedDataParallel(
            _Call(network, function),
            process_group=self._group,
            find_unused_parameters=may_skip,
            gradient_as_bucket_view=True,
            **{BUFFERS_STAY: False},
        )

    @contextlib.contextmanager
    def exchanging(self, *calls: Callable[..., Any], now: bool) -> Iterator[None]:
        """While open, forward and backward passes of `calls` (from `call`) take the mean of the gradients if `now`;
        else they only add to this rank's own: all micro-batches of a step but the last.
        """
        with contextlib.ExitStack() as stack:
            for call in calls:
                if isinstance(call, DistributedDataParallel) and not now:
                    stack.enter_context(call.no_sync())
            yield

    def mean(self, value: Tensor) -> Tensor:
        """The mean of the ranks' `value`, without gradient."""
        return self.total(value) / self.count

    def total(self, value: Tensor) -> Tensor:
        """The sum of the ranks' `value`, without gradient."""
        value = value.detach().clone()
        if self.count > 1:
            dist.all_reduce(value, group=self._group)
        return value

    def gather(self, value: Tensor) -> Tensor:
        """The ranks' `value` (equal shapes) one after the other along the first axis, without gradient."""
        value = value.detach().contiguous()
        if self.count == 1:
            return value
        parts = [torch.empty_like(value) for _ in range(self.count)]
        dist.all_gather(parts, value, group=self._group)
        return torch.cat(parts)


class _Call(nn.Module):
    """A function and the network whose weights it uses, as DDP wants them."""

    def __init__(self, network: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        self._function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


class _Sum(torch.autograd.Function):
    """Sum over ranks whose gradient is the sum over ranks: each rank's loss depends on every rank's input."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        value = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradient, ctx.group), None


class _GlobalStatistics(nn.modules.batchnorm._BatchNorm):
    """A batch norm over the joined batches of all ranks.

    torch's SyncBatchNorm does the same and refuses tensors on a CPU. In evaluation mode, and so once it is frozen, it
    is its parent.
    """

    group: dist.ProcessGroup

    def forward(self, x_BC: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x_BC)
        self._check_input_dim(x_BC)
        with torch.autocast(x_BC.device.type, enabled=False):  # statistics and scaling in 32 bits, as the parent's
            wide_BC = x_BC.float()
            mean_C, var_C, count = self._statistics(wide_BC)
            self._note(mean_C.detach(), var_C.detach() * count / (count - 1))
            shape = (1, -1) + (1,) * (x_BC.ndim - 2)
            scale_C = torch.rsqrt(var_C + self.eps)
            centred_BC = wide_BC - mean_C.view(shape)
            if not self.affine:
                return (centred_BC * scale_C.view(shape)).to(x_BC.dtype)
            scale_C = scale_C * self.weight
            return torch.addcmul(self.bias.view(shape), centred_BC, scale_C.view(shape)).to(x_BC.dtype)

    def _statistics(self, x_BC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, biased variance and number of values of a channel, over all ranks.

        Each rank's own, joined as by Chan et al. 1979 (a sum of squares would cancel where the mean is large). The
        numbers may differ from rank to rank. Adding rows that are zero elsewhere is a gathering with a gradient.
        """
        axes = [axis for axis in range(x_BC.ndim) if axis != 1]
        var_C, mean_C = torch.var_mean(x_BC, axes, correction=0)
        own = torch.cat((mean_C, var_C, mean_C.new_full((1,), x_BC.numel() / x_BC.shape[1])))
        rank, ranks = self.group.rank(), self.group.size()
        rows = torch.stack([own if index == rank else torch.zeros_like(own) for index in range(ranks)])
        means_RC, vars_RC, counts_R1 = _Sum.apply(rows, self.group).split([len(mean_C), len(mean_C), 1], dim=1)
        count = counts_R1.detach().sum()
        shares_R1 = counts_R1.detach() / count
        mean_C = (shares_R1 * means_RC).sum(0)
        return mean_C, (shares_R1 * (vars_RC + (means_RC - mean_C).square())).sum(0), count

    @torch.no_grad()
    def _note(self, mean_C: Tensor, var_C: Tensor) -> None:
        """Move the running statistics, as torch's batch norm does."""
        if not self.track_running_stats:
            return
        self.num_batches_tracked += 1
        weight = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean_C, weight)
        self.running_var.lerp_(var_C, weight)


class GlobalBatchNorm1d(_GlobalStatistics, nn.BatchNorm1d):
    """BatchNorm1d over all ranks."""


class GlobalBatchNorm2d(_GlobalStatistics, nn.BatchNorm2d):
    """BatchNorm2d over all ranks."""


class GlobalBatchNorm3d(_GlobalStatistics, nn.BatchNorm3d):
    """BatchNorm3d over all ranks."""


GLOBAL = {
    nn.BatchNorm1d: GlobalBatchNorm1d,
    nn.BatchNorm2d: GlobalBatchNorm2d,
    nn.BatchNorm3d: GlobalBatchNorm3d,
}


def replace_batch_norms(network: nn.Module, group: dist.ProcessGroup) -> None:
    """Give every batch norm below `network` the statistics of all ranks of `group`.

    The new modules hold the very weights and statistics of the old ones under the same names.
    """
    for parent in list(network.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm) in GLOBAL:
                setattr(parent, name, _global(norm, group))


def _global(norm: nn.modules.batchnorm._BatchNorm, group: dist.ProcessGroup) -> _GlobalStatistics:
    made = GLOBAL[type(norm)](
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
    )
    made.group = group
    made._parameters, made._buffers = norm._parameters, norm._buffers
    return made.train(norm.training)

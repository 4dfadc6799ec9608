"""What an objective is: a function of a packed batch and the decoder's output.

Every rank returns sums, never means. megatron-core adds the integer weights of all microbatches, data and context
ranks and divides the gradient once (finalize_model_grads.py), which is exact however unevenly masks fall.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from megatron_ext.data.batch import Batch


@dataclass(frozen=True)
class LossSums:
    """One microbatch's share of the loss on one rank."""

    loss_sum: Tensor
    """Weighted sum of token losses, fp32 scalar, differentiable."""

    weight_sum: Tensor
    """Sum of the integer weights, int32 scalar: what loss_sum is divided by after all ranks have added theirs."""

    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Name -> (sum, count), both detached; logged as sum / count over the global batch."""


class Objective(Protocol):
    """Turns the decoder's loss per token into the sums that are optimized and logged."""

    def metric_names(self, dataset_names: Sequence[str]) -> tuple[str, ...]:
        """Keys of LossSums.metrics, in one order on every rank."""
        ...

    def loss(self, batch: Batch, loss_BT: Tensor, dataset_names: Sequence[str]) -> LossSums:
        """`loss_BT`: cross entropy per token of this rank's share of the row, fp32."""
        ...

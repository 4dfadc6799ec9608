"""The head without logits: output projection and cross entropy in chunks, so that full logits never exist.

5,120 tokens x 184,622 ids in fp32 are 3.8 GB, and their gradient is as much again. Here a chunk's logits live for
the time of two matrix products: the forward pass goes over the tokens and keeps one log-sum-exp for each; the backward
pass computes logits again and goes over the vocabulary, so that each row of the weight's gradient, the largest tensor
here (1.5 GB in bf16), is read and written once and not once a chunk.

Shape legend: S sequence, B rows (1), T = S x B tokens, C tokens or rows of a chunk, H hidden size, V this tensor rank's
share of the padded vocabulary, R its real rows (padding left out). Under sequence parallelism S of the head's input is
this tensor rank's share.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_ext.plan.memory import LOGITS_OF_A_CHUNK


class ChunkedHead(ColumnParallelLinear):
    """megatron-core's output layer, which hands hidden states through where a loss is wanted.

    Same parameter, same checkpoint key. With `defers_projection` its output is its input, and `loss` does the rest.
    """

    defers_projection = False
    chunk_elements = LOGITS_OF_A_CHUNK

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """logits_SBV, or hidden_SBH itself with `defers_projection`; no bias."""
        if self.defers_projection:
            return input_, None
        return super().forward(input_, weight, runtime_gather_output)

    def loss(self, hidden_SBH: Tensor, labels_BS: Tensor, real_rows: int) -> Tensor:
        """Cross entropy per token, loss_BS in fp32, differentiable for any upstream gradient.

        `real_rows`: R; the rows after it are padding, which is neither label nor alternative and gets no gradient.
        """
        if self.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            hidden_SBH = copy_to_tensor_model_parallel_region(hidden_SBH, group=self.tp_group)
        loss_T = _LinearCrossEntropy.apply(
            hidden_SBH.flatten(0, 1),
            self.weight,
            labels_BS.t().flatten(),
            real_rows,
            self.chunk_elements,
            self.tp_group,
        )
        return loss_T.view(labels_BS.t().shape).t()


class _LinearCrossEntropy(torch.autograd.Function):
    """log sum exp(hidden . weight) - hidden . weight[label], with the vocabulary sharded over `group`."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, real_rows: int, chunk_elements: int,
        group: dist.ProcessGroup,
    ) -> Tensor:  # fmt: skip
        weight_RH = weight_VH[:real_rows]
        # Ids are dealt to the ranks V at a time; a label of another rank, or none of the vocabulary, is no row here.
        rows_T = labels_T - group.rank() * weight_VH.size(0)
        here_T = (rows_T >= 0) & (rows_T < real_rows)
        rows_T = torch.where(here_T, rows_T, 0)
        lse_T = hidden_TH.new_empty(hidden_TH.size(0), dtype=torch.float32)
        target_T = torch.zeros_like(lse_T)
        for part in _chunks(hidden_TH.size(0), real_rows, chunk_elements):
            logits_CR = (hidden_TH[part] @ weight_RH.t()).float()
            lse_T[part] = logits_CR.logsumexp(dim=-1)
            target_T[part] = logits_CR.gather(1, rows_T[part, None]).squeeze(1)
        target_T = torch.where(here_T, target_T, 0.0)
        if not real_rows:  # all of this rank's rows are padding
            lse_T.fill_(-torch.inf)
        if group.size() > 1:
            lse_T, target_T = _combine(lse_T, target_T, group)
        ctx.save_for_backward(hidden_TH, weight_VH, rows_T, here_T, lse_T)
        ctx.real_rows, ctx.chunk_elements = real_rows, chunk_elements
        return lse_T - target_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, rows_T, here_T, lse_T = ctx.saved_tensors
        grad_hidden_TH = torch.zeros_like(hidden_TH, dtype=torch.float32)
        wants_weight = ctx.needs_input_grad[1]
        # megatron-core's gradient buffer is fp32: chunks add up there, and no second matrix of that size is made.
        in_buffer = wants_weight and hasattr(weight_VH, "main_grad")
        grad_VH = None
        if wants_weight:
            grad_VH = weight_VH.main_grad if in_buffer else torch.zeros_like(weight_VH, dtype=torch.float32)
        tokens_T = torch.arange(len(hidden_TH), device=hidden_TH.device)
        for part in _chunks(ctx.real_rows, hidden_TH.size(0), ctx.chunk_elements):
            weight_CH = weight_VH[part]
            # softmax - one-hot, times the gradient of the token
            grad_TC = (hidden_TH @ weight_CH.t()).float().sub_(lse_T[:, None]).exp_()
            inside_T = here_T & (rows_T >= part.start) & (rows_T < part.stop)
            column_T = torch.where(inside_T, rows_T - part.start, 0)
            # Indexing, not scatter_add_: that has no deterministic kernel on a GPU.
            grad_TC[tokens_T, column_T] -= inside_T.float()
            grad_TC = grad_TC.mul_(grad_T[:, None]).to(hidden_TH.dtype)
            grad_hidden_TH.add_(grad_TC @ weight_CH)
            if wants_weight:
                grad_VH[part].add_(grad_TC.t() @ hidden_TH)
        if in_buffer:
            # What megatron-core's own fused accumulation leaves (tensor_parallel/layers.py, main_grad): a mark, and a
            # gradient that nobody reads, because overlapped reduction counts gradients.
            weight_VH.grad_added_to_main_grad = True
            grad_VH = torch.empty_like(weight_VH)
        elif wants_weight:
            grad_VH = grad_VH.to(weight_VH.dtype)
        return grad_hidden_TH.to(hidden_TH.dtype), grad_VH, None, None, None, None


def _combine(lse_T: Tensor, target_T: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and label logit over all ranks' rows, in two collectives over the whole row."""
    largest_T = lse_T.clone()
    dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group)
    sums_2T = torch.stack(((lse_T - largest_T).exp(), target_T))
    dist.all_reduce(sums_2T, group=group)
    return sums_2T[0].log() + largest_T, sums_2T[1]


def _chunks(total: int, other: int, elements: int) -> list[slice]:
    """Slices that cover `total`, each by `other` at most `elements` (but one at least); none where nothing is."""
    size = max(1, elements // max(1, other))
    return [slice(first, min(first + size, total)) for first in range(0, total, size)] if other else []

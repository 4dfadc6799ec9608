"""Core attention in plain torch over packed documents, with context parallelism: what Transformer Engine does with THD
batches, for machines without it.

Shape legend: T tokens of the row, N query heads, K key-value heads, D channels per head, H = N x D. T of a local
tensor is the context rank's share of the row; heads are this tensor rank's.

Each segment (a document, or a window) is cut into 2 x context_parallel_size chunks, and a rank holds chunks r and
2 x size - 1 - r of each, so that causal work is even (`megatron_ext.data.batch.context_indices` is the one
definition). Keys and values are gathered over the context axis; each local chunk then attends to its segment up to
its own last token.
"""

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.data.batch import context_indices


class PackedAttention(torch.nn.Module):
    """Causal scaled-dot-product attention within the segments of a packed row (megatron-core's core_attention)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.softmax_scale = softmax_scale
        self.context_group = pg_collection.cp

    def forward(
        self,
        query_TND: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Returns context_TH. `packed_seq_params.cu_seqlens_q` bounds the segments of the whole row."""
        cu_seqlens = packed_seq_params.cu_seqlens_q
        size, rank = self.context_group.size(), self.context_group.rank()
        if size > 1:
            key_TKD, value_TKD = self._gather(key_TKD, value_TKD, cu_seqlens)
        pieces = [
            self._attend(query_TND[local], key_TKD[keys], value_TKD[keys])
            for local, keys in local_chunks(cu_seqlens.tolist(), rank, size)
        ]
        return torch.cat(pieces).flatten(start_dim=1)

    def _gather(self, key_TKD: Tensor, value_TKD: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole row, in row order. The gradient is summed over the context axis and
        scattered."""
        both = torch.stack((key_TKD, value_TKD), dim=1)
        gathered = gather_from_sequence_parallel_region(both, group=self.context_group)
        size = self.context_group.size()
        order = torch.cat([context_indices(cu_seqlens, rank, size) for rank in range(size)])
        return gathered.index_select(0, order.argsort()).unbind(dim=1)

    def _attend(self, query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor) -> Tensor:
        """One chunk of queries, the last of which sees the last key."""
        dropout = self.config.attention_dropout if self.training else 0.0
        num_queries, num_keys = query_TND.shape[0], key_TKD.shape[0]
        mask = None
        if num_queries < num_keys:
            ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query_TND.device)
            mask = ones.tril(diagonal=num_keys - num_queries)

        def attend() -> Tensor:
            context = F.scaled_dot_product_attention(
                query_TND.transpose(0, 1)[None],
                key_TKD.transpose(0, 1)[None],
                value_TKD.transpose(0, 1)[None],
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=self.softmax_scale,
                enable_gqa=True,
            )
            return context[0].transpose(0, 1)

        # Heads are sharded over the tensor axis, so their dropout is too. Under sequence parallelism megatron-core has
        # entered the sharded random stream already (transformer_block.py, rng_context).
        if dropout == 0.0 or self.config.sequence_parallel:
            return attend()
        with get_cuda_rng_tracker().fork():
            return attend()


def local_chunks(bounds: list[int], rank: int, size: int) -> list[tuple[slice, slice]]:
    """(slice of the local row, slice of the whole row that its queries may see), in local order.

    Without context parallelism a segment is one chunk.
    """
    chunks, cursor = [], 0
    for start, end in zip(bounds, bounds[1:], strict=False):
        length = (end - start) // (2 * size)
        if size == 1:
            chunks.append((slice(start, end), slice(start, end)))
            continue
        for part in (rank, 2 * size - 1 - rank):
            seen = slice(start, start + (part + 1) * length)
            chunks.append((slice(cursor, cursor + length), seen))
            cursor += length
    return chunks

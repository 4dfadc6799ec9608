"""What one rank's microbatch holds, and the single place where it is cut for context parallelism.

Shapes: B = 1 (windows of a microbatch are laid end to end in one row: "THD"), T = tokens of the row (m windows of S),
S = seq_length. `segments` are the stretches that attention does not leave; their ends are `cu_seqlens`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_ext.config import InputError
from megatron_ext.data.windows import Window


@dataclass(frozen=True)
class Batch:
    """m windows as one row of T = m * S tokens, or one context rank's share of that row."""

    tokens_BT: torch.Tensor
    """int64 [1, T_local]: input ids."""

    labels_BT: torch.Tensor
    """int64 [1, T_local]: the id to predict at each position; any valid id where label_mask_BT is False."""

    position_ids_BT: torch.Tensor
    """int64 [1, T_local]: position inside the token's segment, from 0."""

    label_mask_BT: torch.Tensor
    """bool [1, T_local]: False after a document's last id, after a cut, and in padding."""

    dataset_BT: torch.Tensor
    """int64 [1, T_local]: index of the dataset the token's window comes from."""

    cu_seqlens: torch.Tensor
    """int32 [n + 1]: ends of the segments of the whole row, from 0 to T; the same on every context rank."""

    max_seqlen: int
    """S: no segment is longer."""

    num_windows: int
    """m."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        tensors = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **tensors)


def collate(windows: Sequence[Window], datasets: Sequence[int], attention_scope: str) -> Batch:
    """Lay windows of equal length end to end in one row.

    Args:
        windows: m of them.
        datasets: index of the dataset of each.
        attention_scope: "document": segments are the windows' pieces, each with its alignment padding, and a window's
            rest; "window": segments are the windows.
    """
    seq_length = len(windows[0].ids)
    ends = [window.boundaries[1:] if attention_scope == "document" else np.array([seq_length]) for window in windows]
    cu_seqlens = np.concatenate([[0], *(end + number * seq_length for number, end in enumerate(ends))])
    positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
    return Batch(
        tokens_BT=_row([window.ids for window in windows]),
        labels_BT=_row([window.labels for window in windows]),
        position_ids_BT=_row([positions]),
        label_mask_BT=_row([window.mask for window in windows]),
        dataset_BT=_row([np.repeat(np.asarray(datasets, dtype=np.int64), seq_length)]),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=seq_length,
        num_windows=len(windows),
    )


def context_indices(cu_seqlens: torch.Tensor, context_rank: int, context_size: int) -> torch.Tensor:
    """Positions of the row that a context rank holds: int64 [T / context_size].

    Each segment is cut into 2 * size chunks of equal length; rank r takes chunks r and 2 * size - 1 - r, in this
    order, so that every rank has the same share of causal attention's work (Transformer Engine's layout:
    `thd_get_partitioned_indices`).

    Raises:
        InputError: a segment's length is no multiple of 2 * size.
    """
    starts_n = cu_seqlens[:-1].long()
    lengths_n = cu_seqlens.long().diff()
    chunks = 2 * context_size
    if bool((lengths_n % chunks).any()):
        raise InputError(
            f"a segment of {int(lengths_n[lengths_n % chunks > 0][0])} tokens cannot be cut for "
            f"context_parallel_size {context_size}: make data.document_alignment a multiple of {chunks} "
            "(with attention_scope window: train.seq_length)"
        )
    sizes_n = lengths_n // chunks
    first_n = starts_n + context_rank * sizes_n
    second_n = starts_n + (chunks - 1 - context_rank) * sizes_n
    begins = torch.stack([first_n, second_n], dim=1).flatten()
    sizes = sizes_n.repeat_interleave(2)
    before = sizes.cumsum(0) - sizes
    return torch.arange(int(sizes.sum()), device=cu_seqlens.device) + (begins - before).repeat_interleave(sizes)


def slice_for_context(batch: Batch, context_rank: int, context_size: int) -> Batch:
    """The share of a whole row that a context rank holds; `cu_seqlens` stays the whole row's.

    Raises:
        InputError: a segment's length is no multiple of 2 * context_size (for sizes above 1).
    """
    if context_size == 1:
        return batch
    indices = context_indices(batch.cu_seqlens, context_rank, context_size)
    per_token = ("tokens_BT", "labels_BT", "position_ids_BT", "label_mask_BT", "dataset_BT")
    return dataclasses.replace(batch, **{name: getattr(batch, name)[:, indices] for name in per_token})


def _row(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts)).unsqueeze(0)

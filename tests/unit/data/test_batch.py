"""Rows of windows and their context-parallel slices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config import InputError
from megatron_ext.data import Batch, Window, collate, context_indices, slice_for_context
from tests.support.oracles import transformer_engine_indices

S = 16


def window(ends: list[int], start_id: int) -> Window:
    ids = np.arange(start_id, start_id + S)
    return Window(ids=ids, labels=ids + 1, mask=ids % 3 > 0, boundaries=np.array([0, *ends]))


def batch(scope: str) -> Batch:
    return collate([window([4, 12, 16], 100), window([16], 200)], [2, 0], scope)


def test_scope_document():
    row = batch("document")
    assert row.cu_seqlens.tolist() == [0, 4, 12, 16, 32] and row.cu_seqlens.dtype == torch.int32
    assert row.position_ids_BT.tolist() == [[*range(4), *range(8), *range(4), *range(16)]]
    assert row.tokens_BT.tolist() == [[*range(100, 116), *range(200, 216)]]
    assert row.labels_BT.tolist() == [[*range(101, 117), *range(201, 217)]]
    assert row.dataset_BT.tolist() == [[2] * 16 + [0] * 16]
    assert row.label_mask_BT.dtype == torch.bool and row.tokens_BT.dtype == torch.int64
    assert (row.max_seqlen, row.num_windows) == (S, 2)


def test_scope_window():
    row = batch("window")
    assert row.cu_seqlens.tolist() == [0, 16, 32]
    assert row.position_ids_BT.tolist() == [[*range(16), *range(16)]]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 4))
@settings(deadline=None)
def test_slice_is_transformer_engines(chunks, size):
    cu_seqlens = [0, *np.cumsum([2 * size * n for n in chunks]).tolist()]
    for rank in range(size):
        indices = context_indices(torch.tensor(cu_seqlens, dtype=torch.int32), rank, size)
        assert indices.tolist() == transformer_engine_indices(cu_seqlens, cu_seqlens[-1], size, rank)


@pytest.mark.parametrize("scope", ["document", "window"])
def test_slices_partition_the_row(scope):
    row = batch(scope)
    slices = [slice_for_context(row, rank, 2) for rank in range(2)]
    for name in ("tokens_BT", "labels_BT", "position_ids_BT", "label_mask_BT", "dataset_BT"):
        joined = torch.cat([getattr(part, name) for part in slices], dim=1)
        order = torch.cat([part.tokens_BT for part in slices], dim=1).argsort()
        assert torch.equal(joined.gather(1, order), getattr(row, name).gather(1, row.tokens_BT.argsort()))
    assert all(torch.equal(part.cu_seqlens, row.cu_seqlens) for part in slices)
    assert all(part.max_seqlen == S and part.num_windows == 2 for part in slices)


def test_a_single_context_rank_holds_the_row():
    row = collate([window([3, 16], 0)], [0], "document")  # odd segments are nobody's concern without a cut
    assert slice_for_context(row, 0, 1) is row


def test_uneven_segments_are_refused():
    with pytest.raises(InputError, match="document_alignment a multiple of 8"):
        slice_for_context(batch("document"), 0, 4)


def test_to_keeps_everything():
    row = batch("document")
    moved = row.to("meta")
    assert moved.tokens_BT.device.type == "meta" and moved.cu_seqlens.device.type == "meta"
    assert (moved.max_seqlen, moved.num_windows) == (S, 2)

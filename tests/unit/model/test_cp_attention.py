"""Packed attention equals a dense mask over the whole row, written independently."""

import types

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_ext.data.batch import context_indices
from megatron_ext.model.cp_attention import PackedAttention, local_chunks
from tests.support.oracles import dense_attention, segment_mask

T, N, K, D = 48, 4, 2, 8
BOUNDS = [0, 16, 24, 48]


def test_equals_a_dense_mask():
    torch.manual_seed(0)
    group = types.SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    config = types.SimpleNamespace(attention_dropout=0.0, sequence_parallel=False)
    attention = PackedAttention(config, 1, None, "self", pg_collection=types.SimpleNamespace(cp=group))
    tensors = [torch.randn(T, heads, D, requires_grad=True) for heads in (N, K, K)]
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(BOUNDS, dtype=torch.int32))
    found = attention(*tensors, None, packed_seq_params=packed)
    expected = dense_attention(*tensors, segment_mask(BOUNDS))
    assert (found - expected).abs().max() < 1e-5  # measured 5e-7
    upstream = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, tensors, upstream), torch.autograd.grad(expected, tensors, upstream), strict=True
    ):
        assert (ours - theirs).abs().max() < 1e-5  # measured 1e-6


@pytest.mark.parametrize("size", [2, 4])
def test_chunks_are_the_batch_slice_and_see_their_past(size):
    """The chunks of all ranks cover the row as the batch is sliced, each ending where its visible keys end."""
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    for rank in range(size):
        row = context_indices(cu_seqlens, rank, size).tolist()
        chunks = local_chunks(BOUNDS, rank, size)
        assert [index for local, _ in chunks for index in range(local.start, local.stop)] == list(range(len(row)))
        for local, seen in chunks:
            positions = row[local]
            assert positions == list(range(seen.stop - len(positions), seen.stop))
            assert seen.start == max(bound for bound in BOUNDS if bound <= positions[0])

"""Context-parallel attention takes the batch that Transformer Engine takes: each rank is given the tokens that
Transformer Engine's kernel would give it, and together they compute dense attention over the whole row."""

import pytest
import torch

from tests.support.oracles import dense_attention, segment_mask, transformer_engine_indices

N, K, D = 4, 2, 8
BOUNDS = [0, 16, 24, 48, 64]
"""Segments of one, two and three times 8, so that each has its chunks at context-parallel size 2 and 4."""


def tensors() -> tuple[list[torch.Tensor], torch.Tensor]:
    """query_TND, key_TKD, value_TKD of the whole row, and the gradient of its context_TH."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(BOUNDS[-1], heads, D, generator=generator) for heads in (N, K, K)]
    return whole, torch.randn(BOUNDS[-1], N * D, generator=generator)


def attend(context_parallel_size: int) -> list[torch.Tensor]:
    """This rank's context, and the gradients of its queries, keys and values."""
    import types

    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_ext.config.parallel import ParallelConfig
    from megatron_ext.config.runtime import RuntimeConfig
    from megatron_ext.model.cp_attention import PackedAttention
    from megatron_ext.runtime import Topology

    parallel = ParallelConfig(context_parallel_size=context_parallel_size)
    with Topology.start(RuntimeConfig(device="cpu"), parallel) as topology:
        mine = transformer_engine_indices(BOUNDS, BOUNDS[-1], context_parallel_size, topology.context_parallel_rank)
        whole, upstream_TH = tensors()
        local = [tensor[mine].requires_grad_() for tensor in whole]
        config = types.SimpleNamespace(attention_dropout=0.0, sequence_parallel=False)
        attention = PackedAttention(config, 1, None, "self", pg_collection=topology.groups)
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(BOUNDS, dtype=torch.int32))
        context_TH = attention(*local, None, packed_seq_params=packed)
        return [context_TH.detach(), *torch.autograd.grad(context_TH, local, upstream_TH[mine])]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_are_dense_attention(size, ranks):
    whole, upstream_TH = tensors()
    whole = [tensor.requires_grad_() for tensor in whole]
    context_TH = dense_attention(*whole, segment_mask(BOUNDS))
    expected = [context_TH.detach(), *torch.autograd.grad(context_TH, whole, upstream_TH)]
    for rank, found in enumerate(ranks.run(attend, size, size)):
        mine = transformer_engine_indices(BOUNDS, BOUNDS[-1], size, rank)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs[mine]).abs().max() < 1e-5  # measured 7e-7

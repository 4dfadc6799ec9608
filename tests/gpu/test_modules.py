"""What the decoder is made of on a GPU: its modules, attention and RoPE against plain torch, its waits, its memory.

Shape legend: T tokens of the row, N query heads, K key-value heads, D channels per head, H = N x D.
"""

import dataclasses

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_ext.config.objective import ObjectiveConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.data.batch import Window, collate
from megatron_ext.model import build_model
from megatron_ext.model.cp_attention import PackedAttention
from megatron_ext.model.emu3 import transformer_config
from megatron_ext.objectives import build_objective
from megatron_ext.optim import build_optimizer
from megatron_ext.plan import DecoderShape
from megatron_ext.runtime import seed_microbatch
from megatron_ext.vocab import VocabLayout
from tests.support.decoding import LAYOUT, MODEL, OPTIM

SMALL = dataclasses.replace(MODEL, hidden_size=256, ffn_hidden_size=512, num_query_groups=2, kv_channels=64)
CUTS = ([0, 8, 200, 208, 384, 512], [0, 512], [0, 16, 32, 48, 64, 80, 496, 504, 512])


def window(bounds: list[int], layout: VocabLayout = LAYOUT) -> Window:
    """Random ids in segments that end at `bounds`; every token has a label."""
    ids = np.random.default_rng(5).integers(0, layout.size, bounds[-1])
    return Window(ids=ids, labels=np.roll(ids, -1), mask=np.ones(len(ids), bool), boundaries=np.array(bounds))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found.cpu().float() - expected).norm() / expected.norm())


def test_every_module_is_transformer_engines(topology):
    decoder = build_model(dataclasses.replace(SMALL, qk_layernorm=True), ParallelConfig(), LAYOUT, topology, seed=1)
    layer = decoder.decoder.layers[0]
    attention, mlp = layer.self_attention, layer.mlp
    parts = (attention.linear_qkv, attention.core_attention, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
    parts += (attention.q_layernorm, attention.k_layernorm, decoder.decoder.final_layernorm)
    for part in parts:
        assert any(base.__module__.startswith("transformer_engine.") for base in type(part).__mro__), type(part)
    assert {parameter.device for parameter in decoder.parameters()} == {topology.device}
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.bfloat16}


def test_the_optimizer_is_fused_adam_on_fp32_master_weights(topology):
    from transformer_engine.pytorch.optimizers import FusedAdam

    decoder = build_model(SMALL, ParallelConfig(), LAYOUT, topology, seed=1)
    (inner,) = build_optimizer(OPTIM, ParallelConfig(), decoder, topology, 4).inner.chained_optimizers
    assert isinstance(inner.optimizer, FusedAdam)
    assert {p.dtype for group in inner.optimizer.param_groups for p in group["params"]} == {torch.float32}


@pytest.mark.parametrize("bounds", CUTS, ids=len)
def test_packed_attention_equals_plain_torch(topology, bounds):
    """Transformer Engine's THD attention in bf16 against ours in fp32 on the CPU, on the same bf16 numbers."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.packed_seq_params import PackedSeqParams

    shape = dataclasses.replace(DecoderShape.of(SMALL), num_attention_heads=8)
    config = transformer_config(shape, ParallelConfig(), topology)
    arguments = (config, 1, AttnMaskType.causal, "self")
    fused = TEDotProductAttention(*arguments, pg_collection=topology.groups)
    plain = PackedAttention(*arguments, pg_collection=topology.groups)
    generator = torch.Generator().manual_seed(3)
    heads = (shape.num_attention_heads, shape.num_query_groups, shape.num_query_groups)
    inputs = [torch.randn(bounds[-1], n, 64, generator=generator).bfloat16() for n in heads]
    grad_TH = torch.randn(bounds[-1], heads[0] * 64, generator=generator).bfloat16()

    def run(attention, device, dtype):
        leaves = [tensor.to(device, dtype).requires_grad_() for tensor in inputs]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=bounds[-1], max_seqlen_kv=bounds[-1],
        )  # fmt: skip
        context_TH = attention(*leaves, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed)
        context_TH.flatten(start_dim=1).backward(grad_TH.to(device, dtype))
        return [context_TH.detach().flatten(start_dim=1), *(leaf.grad for leaf in leaves)]

    expected = run(plain, "cpu", torch.float32)
    found = run(fused, topology.device, torch.bfloat16)
    for name, ours, theirs in zip(("context", "dq", "dk", "dv"), found, expected, strict=True):
        # Not measured yet: sums of bf16 operands land between 1e-3 and 1e-2.
        assert distance(ours, theirs) < 1.5e-2, name


@pytest.mark.parametrize("bounds", CUTS, ids=len)
def test_fused_rope_changes_nothing(topology, bounds):
    """Fused, positions restart in each document; unfused, they run on through the row. RoPE is relative."""
    decoder = build_model(SMALL, ParallelConfig(), LAYOUT, topology, seed=1).eval()
    batch = collate([window(bounds)], [0], "document").to(topology.device)
    assert decoder.decoder.layers[0].self_attention.config is decoder.config and decoder.config.apply_rope_fusion
    with torch.no_grad():
        fused_BT = decoder.forward_batch(batch)
        decoder.config.apply_rope_fusion = False
        plain_BT = decoder.forward_batch(batch)
    assert not fused_BT.equal(plain_BT)
    assert distance(fused_BT, plain_BT.cpu()) < 5e-3  # not measured yet: the unfused rounds sine and cosine to bf16


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_microbatch_never_waits_for_the_gpu(topology, dropout):
    """The longest segment is given (max_seqlen), so nothing is read back, however documents fall."""
    model = dataclasses.replace(SMALL, attention_dropout=dropout, hidden_dropout=dropout)
    decoder = build_model(model, ParallelConfig(), LAYOUT, topology, seed=1)
    objective = build_objective(ObjectiveConfig(), LAYOUT)
    batches = [collate([window(bounds)], [0], "document").to(topology.device) for bounds in CUTS]

    def backward(step, batch):
        seed_microbatch(1, step, 0, topology)
        objective.loss(batch, decoder.forward_batch(batch), ("a",)).loss_sum.backward()

    for step, batch in enumerate(batches):  # kernels are compiled and graphs built here
        backward(step, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, batch in enumerate(batches):
            backward(step, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_head_never_holds_the_logits(topology):
    layout, tokens = VocabLayout.emu3(), 8192
    model = dataclasses.replace(SMALL, num_layers=1)
    decoder = build_model(model, ParallelConfig(), layout, topology, seed=1)
    batch = collate([window([0, tokens], layout)], [0], "window").to(topology.device)
    decoder.forward_batch(batch).sum().backward()  # gradients and workspaces are allocated
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    decoder.forward_batch(batch).sum().backward()
    rise = torch.cuda.max_memory_allocated() - before
    logits = tokens * decoder.vocab_size * 2  # in bf16: 3 GB; the fp32 copy of a plain head is twice that
    assert rise < 0.6 * logits, f"{rise / 2**30:.2f} GiB"  # not measured yet

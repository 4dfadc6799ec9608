"""The tables: every name in exactly one rule, both directions inverse, shards join to the whole."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Emu3ForCausalLM,
    Emu3TextConfig,
    Emu3VQVAE,
    Emu3VQVAEConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_ext.config import InputError
from megatron_ext.hf.decoder import (
    canonical_name,
    decoder_table,
    shape_from_text_config,
    text_config,
    their_shapes,
)
from megatron_ext.hf.table import Rule, Table, UnknownName
from megatron_ext.hf.vision import vision_config, vision_table, vq_config
from megatron_ext.plan import PRESETS, DecoderShape
from megatron_ext.vision import MoVQGAN, VisionTokenizerConfig
from megatron_ext.vocab import VocabLayout
from tests.support.releases import lazy, whole

LAYOUT = VocabLayout.custom(text_size=30, codebook_size=20)


def shape_of(groups: int = 2, heads_per_group: int = 3) -> DecoderShape:
    return DecoderShape(
        num_layers=2, hidden_size=24, ffn_hidden_size=32, num_attention_heads=groups * heads_per_group,
        num_query_groups=groups, kv_channels=4,
    )  # fmt: skip


def transformers_state(shape: DecoderShape) -> dict[str, torch.Tensor]:
    model = Emu3ForCausalLM(Emu3TextConfig(**text_config(shape, LAYOUT, 64)))
    return {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def assert_same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("size", [1, 2, 4])
@settings(max_examples=5, deadline=None)
@given(heads_per_group=st.integers(1, 3))
def test_decoder_shards_join_to_the_original(size: int, heads_per_group: int) -> None:
    shape = shape_of(groups=4, heads_per_group=heads_per_group)
    table = decoder_table(shape, LAYOUT.size, padded_vocab_size=64)
    state = transformers_state(shape)
    shards = [table.to_ours(lazy(state), rank, size) for rank in range(size)]
    back = {}
    for name in shards[0]:
        match = table.match_ours(name)
        back |= zip(match.theirs, match.rule.to_theirs([shard[name] for shard in shards]), strict=True)
    assert_same(whole(back.items()), state)


def test_attention_rows_stand_per_group() -> None:
    """Against a ten-line construction by heads: q0 q1 q2 k0 v0 | q3 q4 q5 k1 v1."""
    shape = shape_of(groups=2, heads_per_group=3)
    state = transformers_state(shape)
    ours = decoder_table(shape, LAYOUT.size, 64).to_ours(lazy(state))[
        "decoder.layers.0.self_attention.linear_qkv.weight"
    ]
    q, k, v = (state[f"model.layers.0.self_attn.{part}_proj.weight"].split(4) for part in "qkv")
    assert torch.equal(ours.whole(), torch.cat([*q[:3], k[0], v[0], *q[3:], k[1], v[1]]))


def test_gate_and_up_are_sharded_apart() -> None:
    shape = shape_of()
    state = transformers_state(shape)
    shard = decoder_table(shape, LAYOUT.size, 64).to_ours(lazy(state), rank=1, size=2)
    gate, up = (state[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    assert torch.equal(shard["decoder.layers.1.mlp.linear_fc1.weight"].whole(), torch.cat([gate[16:], up[16:]]))


def test_padding_rows_are_zero_and_come_off() -> None:
    shape = shape_of()
    table = decoder_table(shape, LAYOUT.size, padded_vocab_size=64)
    state = transformers_state(shape)
    ours = table.to_ours(lazy(state))
    assert ours["output_layer.weight"].rows == 64 and not ours["output_layer.weight"].read(LAYOUT.size, 64).any()
    assert_same(whole(table.to_theirs(ours.items())), state)


def test_qk_norm_has_rules() -> None:
    table = decoder_table(PRESETS["emu3_5_34b"], 100, 128)
    match = table.match_ours("decoder.layers.7.self_attention.q_layernorm.weight")
    assert match.theirs == ("model.layers.7.self_attn.q_norm.weight",)


def test_unfused_norms_have_canonical_names() -> None:
    layer = "decoder.layers.3."
    fused = layer + "self_attention.linear_qkv.layer_norm_weight"
    assert canonical_name(layer + "input_layernorm.weight") == fused == canonical_name(fused)
    assert canonical_name(layer + "pre_mlp_layernorm.weight") == layer + "mlp.linear_fc1.layer_norm_weight"


@pytest.mark.parametrize(
    "name", ["model.layers.x.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias", "rotary.inv_freq"]
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(UnknownName):
        decoder_table(shape_of(), LAYOUT.size, 64).match_theirs(name)


def test_the_first_matching_rule_decides() -> None:
    table = Table([Rule(ours="a.{n}.special", theirs=("b.{n}.special",)), Rule(ours="{rest}", theirs=("c.{rest}",))])
    assert table.match_ours("a.1.special").theirs == ("b.1.special",)
    assert table.match_ours("a.1.other").theirs == ("c.a.1.other",)


@pytest.mark.parametrize(
    "config",
    [
        VisionTokenizerConfig(codebook_size=16, ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, attn_resolutions=(2, 3)),
        VisionTokenizerConfig(codebook_size=16, ch=32, ch_mult=(1, 2), num_res_blocks=2, attn_resolutions=(1,)),
        VisionTokenizerConfig(codebook_size=16, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=()),
    ],
)
def test_vision_names_and_round_trip(config: VisionTokenizerConfig) -> None:
    ours = {name: torch.randn(tensor.shape) for name, tensor in MoVQGAN(config).state_dict().items()}
    theirs = dict(vision_table().to_theirs(lazy(ours).items()))
    expected = Emu3VQVAE(Emu3VQVAEConfig(**vq_config(config))).state_dict()
    assert {name: tensor.shape for name, tensor in theirs.items()} == shapes(expected)
    assert shapes(whole(theirs.items())) == shapes(expected)
    assert_same(whole(vision_table().to_ours(theirs).items()), ours)


def test_full_size_vision_names() -> None:
    """Emu3's own: 495 tensors on both sides."""
    with torch.device("meta"):
        ours = MoVQGAN(VisionTokenizerConfig()).state_dict()
        expected = Emu3VQVAE(Emu3VQVAEConfig()).state_dict()
    theirs = dict(vision_table().to_theirs(lazy(ours).items()))
    assert len(theirs) == len(expected) == 495
    assert {name: tensor.shape for name, tensor in theirs.items()} == shapes(expected)


def test_configurations_come_back() -> None:
    shape = shape_of()
    fields = Emu3TextConfig(**text_config(shape, LAYOUT, 64)).to_dict()
    assert shape_from_text_config(fields) == shape
    assert shape.kv_channels * shape.num_attention_heads == shape.hidden_size and "head_dim" not in fields
    emu3 = PRESETS["emu3_8b"]
    fields = Emu3TextConfig(**text_config(emu3, VocabLayout.emu3(), 9216)).to_dict()
    assert shape_from_text_config(fields) == emu3
    defaults = Emu3TextConfig().to_dict()
    assert {name: fields[name] for name in defaults} == defaults
    full = VisionTokenizerConfig()
    for theirs in (Emu3VQVAEConfig(**vq_config(full)), Emu3VQVAEConfig()):
        assert vision_config(theirs.to_dict()) == full


@pytest.mark.parametrize(
    "field",
    [{"rope_scaling": {"type": "linear", "factor": 2.0}}, {"hidden_act": "gelu"}, {"tie_word_embeddings": True}],
)
def test_what_emu3_lacks_is_refused(field: dict) -> None:
    config = Emu3TextConfig(**text_config(shape_of(), LAYOUT, 64)).to_dict() | {"rope_scaling": None}
    assert shape_from_text_config(config) == shape_of()
    ((name, value),) = field.items()
    with pytest.raises(InputError, match=re.escape(f"{name} is {value!r}")):
        shape_from_text_config(config | field)


def test_names_and_shapes_of_their_decoders() -> None:
    """Against transformers' own modules, with and without QK norm; Emu3's and Emu3.5's at full size."""
    emu3, emu3_5 = PRESETS["emu3_8b"], PRESETS["emu3_5_34b"]
    with torch.device("meta"):
        theirs = Emu3ForCausalLM(Emu3TextConfig(**text_config(emu3, VocabLayout.emu3(), 9216))).state_dict()
        qwen3 = Qwen3ForCausalLM(Qwen3Config(**text_config(emu3_5, VocabLayout.emu3_5(), 32768))).state_dict()
    assert len(theirs) == 291
    assert their_shapes(emu3, VocabLayout.emu3().size) == shapes(theirs)
    assert their_shapes(emu3_5, VocabLayout.emu3_5().size) == shapes(qwen3)


def test_what_transformers_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="stage 0 is 32 wide"):
        vq_config(VisionTokenizerConfig(ch=32, ch_mult=(1, 2), attn_resolutions=(0, 1)))

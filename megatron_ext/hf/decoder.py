"""The decoder: megatron-core's GPTModel <-> the text part of transformers' Emu3, which is also BAAI's own layout.

Our names are megatron-core's with the fused norms of Transformer Engine (`linear_qkv.layer_norm_weight`), the form
that its checkpoints use on every device; `canonical_name` maps the names of the unfused modules to them.
Their names are those of `Emu3ForCausalLM` (E3 modeling_emu3.py); `Emu3ForConditionalGeneration` stores the same under
the prefix `text_model.` (transformers conversion_mapping.py, "emu3").
"""

from typing import Any

import torch

from megatron_ext.config import InputError
from megatron_ext.hf.table import PADDING, Index, Rule, Table
from megatron_ext.plan import DecoderShape
from megatron_ext.vocab import VocabLayout

_UNFUSED_NORMS = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}


def canonical_name(name: str) -> str:
    """megatron-core's name of a parameter as checkpoints have it, whatever the layer spec in memory."""
    for unfused, fused in _UNFUSED_NORMS.items():
        name = name.replace(unfused, fused)
    return name


def decoder_table(shape: DecoderShape, vocab_size: int, padded_vocab_size: int) -> Table:
    """The rules of a decoder of this shape.

    Args:
        vocab_size: rows of their embedding and output matrices, one per id.
        padded_vocab_size: rows of ours; those from vocab_size on stand for no id and exist only here.
    """
    layer, head, group = "decoder.layers.{layer}.", "model.layers.{layer}.", shape.kv_channels * shape.num_query_groups
    query = shape.kv_channels * shape.num_attention_heads
    ffn = shape.ffn_hidden_size
    vocabulary = _padded_rows(vocab_size, padded_vocab_size)
    attention, their_attention = layer + "self_attention.", head + "self_attn."
    return Table(
        (
            Rule(
                ours="embedding.word_embeddings.weight",
                theirs=("model.embed_tokens.weight",),
                sizes=(vocab_size,),
                index=vocabulary,
            ),
            Rule(ours=attention + "linear_qkv.layer_norm_weight", theirs=(head + "input_layernorm.weight",)),
            Rule(
                ours=attention + "linear_qkv.weight",
                theirs=tuple(their_attention + f"{part}_proj.weight" for part in "qkv"),
                sizes=(query, group, group),
                index=_grouped_rows(shape),
            ),
            Rule(ours=attention + "q_layernorm.weight", theirs=(their_attention + "q_norm.weight",)),
            Rule(ours=attention + "k_layernorm.weight", theirs=(their_attention + "k_norm.weight",)),
            Rule(ours=attention + "linear_proj.weight", theirs=(their_attention + "o_proj.weight",), shard_dim=1),
            Rule(ours=layer + "mlp.linear_fc1.layer_norm_weight", theirs=(head + "post_attention_layernorm.weight",)),
            Rule(
                ours=layer + "mlp.linear_fc1.weight",
                theirs=(head + "mlp.gate_proj.weight", head + "mlp.up_proj.weight"),
                sizes=(ffn, ffn),
                index=_gated_rows(ffn),
            ),
            Rule(ours=layer + "mlp.linear_fc2.weight", theirs=(head + "mlp.down_proj.weight",), shard_dim=1),
            Rule(ours="decoder.final_layernorm.weight", theirs=("model.norm.weight",)),
            Rule(
                ours="output_layer.weight",
                theirs=("lm_head.weight",),
                sizes=(vocab_size,),
                index=vocabulary,
            ),
        )
    )


def _padded_rows(rows: int, padded_rows: int) -> Index:
    """The vocabulary's rows, then padding; a shard is a contiguous part."""
    order = torch.cat([torch.arange(rows), torch.full((padded_rows - rows,), PADDING)])
    return lambda rank, size: order.chunk(size)[rank]


def _grouped_rows(shape: DecoderShape) -> Index:
    """Per group: its query heads, its key head, its value head; a shard is whole groups (mcore attention.py)."""
    groups, heads, width = shape.num_query_groups, shape.num_attention_heads, shape.kv_channels
    # Heads of the stacked [q | k | v], seen as a list of row blocks of `width` rows each.
    query = torch.arange(heads).view(groups, heads // groups)
    key = heads + torch.arange(groups).view(groups, 1)
    blocks = torch.cat([query, key, key + groups], dim=1)

    def index(rank: int, size: int) -> torch.Tensor:
        mine = blocks.chunk(size)[rank].reshape(-1, 1)
        return (mine * width + torch.arange(width)).flatten()

    return index


def _gated_rows(ffn: int) -> Index:
    """A shard holds its part of the gate, then its part of the up projection (mcore mlp.py)."""
    order = torch.arange(2 * ffn).view(2, ffn)
    return lambda rank, size: order.chunk(size, dim=1)[rank].flatten()


def text_config(shape: DecoderShape, layout: VocabLayout, max_position_embeddings: int) -> dict[str, Any]:
    """Keyword arguments of transformers' Emu3TextConfig.

    It has one dropout: attention_dropout stands for ours of attention and for that of the hidden states.

    Raises:
        InputError: the shape has QK norm, which transformers' Emu3 does not know.
    """
    if shape.qk_layernorm:
        raise InputError("model.qk_layernorm is true: transformers' Emu3 has no QK norm; generate from the checkpoint")
    config = {
        "vocab_size": layout.size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": shape.layernorm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rotary_base},
        "attention_dropout": shape.attention_dropout,
        "initializer_range": shape.init_method_std,
        "pad_token_id": layout.pad,
        "bos_token_id": layout.bos,
        "eos_token_id": layout.eos,
    }
    if shape.kv_channels * shape.num_attention_heads != shape.hidden_size:
        config["head_dim"] = shape.kv_channels
    return config


def shape_from_text_config(config: dict[str, Any]) -> DecoderShape:
    """The inverse of `text_config`, from the `text_config` of a config.json (or BAAI's own config.json).

    Raises:
        InputError: a field is missing or asks for what Emu3 does not have.
    """
    try:
        heads = config["num_attention_heads"]
        rope = config.get("rope_parameters") or {"rope_type": "default", "rope_theta": config.get("rope_theta", 1e6)}
        dropout = config.get("attention_dropout", 0.1)
        shape = DecoderShape(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config["num_key_value_heads"],
            kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
            layernorm_epsilon=config.get("rms_norm_eps", 1e-5),
            rotary_base=rope["rope_theta"],
            init_method_std=config.get("initializer_range", 0.02),
            attention_dropout=dropout,
            hidden_dropout=dropout,
        )
    except KeyError as missing:
        raise InputError(f"config.json: text_config has no {missing}; is this an Emu3 model?") from None
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"config.json: rope_type {rope['rope_type']!r} is not supported; Emu3 uses 'default'")
    for name, only in (("rope_scaling", None), ("hidden_act", "silu"), ("tie_word_embeddings", False)):
        if config.get(name, only) != only:
            raise InputError(f"config.json: {name} is {config[name]!r}, Emu3 has {only!r}: give a model that has it so")
    return shape

"""The decoder: megatron-core's GPTModel <-> the text part of transformers' Emu3, which is also BAAI's own layout.

With QK norm (Emu3.5) it is transformers' Qwen3, the same architecture otherwise and with the same names.

Our names are megatron-core's with the fused norms of Transformer Engine (`linear_qkv.layer_norm_weight`), the form
that its checkpoints use on every device; `canonical_name` maps the names of the unfused modules to them.
Their names are those of `Emu3ForCausalLM` (E3 modeling_emu3.py); `Emu3ForConditionalGeneration` stores the same under
the prefix `text_model.` (transformers conversion_mapping.py, "emu3").
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ext.checkpoint.lazy import LazyTensor
from megatron_ext.config import InputError
from megatron_ext.hf.table import PADDING, Index, Rule, Table
from megatron_ext.model import Emu3Model
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


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder without a model around it: shape, ids, and the unsharded weights, wherever they are."""

    shape: DecoderShape
    layout: VocabLayout
    tensors: Mapping[str, LazyTensor]
    """Every parameter by its canonical name."""

    @classmethod
    def of(cls, model: Emu3Model) -> "Decoder":
        """The decoder of a model that is not sharded; its weights are shared."""
        tensors = {canonical_name(name): LazyTensor.of(weight.detach()) for name, weight in model.named_parameters()}
        return cls(shape=model.shape, layout=model.layout, tensors=tensors)

    @property
    def parameters(self) -> int:
        """Number of weights, without the rows that pad the vocabulary."""
        sizes = (torch.Size(tensor.shape).numel() for tensor in self.tensors.values())
        padding = self.tensors["output_layer.weight"].rows - self.layout.size
        return sum(sizes) - 2 * padding * self.shape.hidden_size

    def theirs(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, LazyTensor]]:
        """(name, tensor) of `Emu3ForCausalLM`'s state dict; with QK norm of `Qwen3ForCausalLM`'s.

        Args:
            dtype: type of the tensors; None keeps ours.
        """
        table = decoder_table(self.shape, self.layout.size, self.tensors["output_layer.weight"].rows)
        for name, tensor in table.to_theirs(self.tensors.items()):
            yield name, tensor if dtype is None else tensor.to(dtype)


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
            Rule(ours=attention + "linear_proj.weight", theirs=(their_attention + "o_proj.weight",), by_columns=True),
            Rule(ours=layer + "mlp.linear_fc1.layer_norm_weight", theirs=(head + "post_attention_layernorm.weight",)),
            Rule(
                ours=layer + "mlp.linear_fc1.weight",
                theirs=(head + "mlp.gate_proj.weight", head + "mlp.up_proj.weight"),
                sizes=(ffn, ffn),
                index=_gated_rows(ffn),
            ),
            Rule(ours=layer + "mlp.linear_fc2.weight", theirs=(head + "mlp.down_proj.weight",), by_columns=True),
            Rule(ours="decoder.final_layernorm.weight", theirs=("model.norm.weight",)),
            Rule(
                ours="output_layer.weight",
                theirs=("lm_head.weight",),
                sizes=(vocab_size,),
                index=vocabulary,
            ),
        )
    )


def their_shapes(shape: DecoderShape, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of `Emu3ForCausalLM`; with QK norm of `Qwen3ForCausalLM`."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    query, group = shape.kv_channels * shape.num_attention_heads, shape.kv_channels * shape.num_query_groups
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (group, hidden),
        "self_attn.v_proj": (group, hidden),
        "self_attn.o_proj": (hidden, query),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    if shape.qk_layernorm:
        layer |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (shape.kv_channels,))
    layers = {
        f"model.layers.{number}.{name}": size for number in range(shape.num_layers) for name, size in layer.items()
    }
    ends = {"model.embed_tokens": (vocab_size, hidden), "model.norm": (hidden,), "lm_head": (vocab_size, hidden)}
    return {f"{name}.weight": size for name, size in (ends | layers).items()}


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
    """Keyword arguments of transformers' Emu3TextConfig, and of Qwen3Config where the shape has QK norm.

    Emu3 has one dropout: attention_dropout stands for ours of attention and for that of the hidden states.
    """
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
    if shape.qk_layernorm:
        # Qwen3's defaults are 128 channels per head and tied embeddings.
        config |= {"head_dim": shape.kv_channels, "tie_word_embeddings": False, "use_sliding_window": False}
    elif shape.kv_channels * shape.num_attention_heads != shape.hidden_size:
        config["head_dim"] = shape.kv_channels
    return config


_ONLY = {
    "rope_scaling": None,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}


def shape_from_text_config(config: dict[str, Any], *, qk_layernorm: bool = False) -> DecoderShape:
    """The inverse of `text_config`, from the `text_config` of a config.json (or BAAI's own config.json).

    Args:
        qk_layernorm: whether the weights hold norms of queries and keys; no field of a configuration says so.

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
            qk_layernorm=qk_layernorm,
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
    for name, only in _ONLY.items():
        if config.get(name, only) != only:
            raise InputError(f"config.json: {name} is {config[name]!r}, Emu3 has {only!r}: give a model that has it so")
    return shape

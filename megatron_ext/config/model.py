"""Section `model`: shape of the decoder. Names are megatron-core's."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the decoder: a preset, and what to change in it."""

    preset: Literal["tiny", "emu3_8b", "emu3_5_34b"] = "tiny"
    """Shape to start from; emu3_8b and emu3_5_34b are the published ones."""

    num_layers: int | None = None
    """Decoder layers; empty keeps the preset's."""

    hidden_size: int | None = None
    """Width of the residual stream; empty keeps the preset's."""

    ffn_hidden_size: int | None = None
    """Inner width of the SwiGLU MLP; empty keeps the preset's."""

    num_attention_heads: int | None = None
    """Query heads; empty keeps the preset's."""

    num_query_groups: int | None = None
    """Key-value heads (grouped-query attention); empty keeps the preset's."""

    kv_channels: int | None = None
    """Channels per head; empty keeps the preset's."""

    qk_layernorm: bool | None = None
    """RMSNorm on each head's queries and keys (Emu3.5); empty keeps the preset's."""

    rotary_base: float | None = None
    """Base of the rotary frequencies; empty keeps the preset's 1e6."""

    attention_dropout: float | None = None
    """Dropout probability on attention weights; empty keeps the preset's 0.1."""

    hidden_dropout: float | None = None
    """Dropout probability on embeddings and on both residual branches; empty keeps the preset's 0.1."""

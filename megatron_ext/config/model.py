"""Section `model`: shape of the decoder. Names are megatron-core's."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_ext.config.errors import InputError
from megatron_ext.config.section import Bound, Count, Decay, Positive, Section, least

Even = Annotated[int, least(2), Bound("even", lambda value: value % 2 == 0)]


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """Everything about the decoder that its weights and outputs depend on. Names are megatron-core's."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    qk_layernorm: bool = False
    rotary_base: float = 1_000_000.0
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02
    """Every matrix is drawn from N(0, this), output projections too (Emu3's modeling_emu3.py, _init_weights)."""
    attention_dropout: float = 0.1
    hidden_dropout: float = 0.1

    def __post_init__(self) -> None:
        """Raise InputError for a shape that cannot be built."""
        if self.num_attention_heads % self.num_query_groups:
            raise InputError(
                f"model.num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"model.num_query_groups {self.num_query_groups}: change one of them"
            )

    @property
    def identity(self) -> str:
        """What weights of this shape fit: every field that decides a tensor's size or meaning, as text."""
        shaping = {k: v for k, v in vars(self).items() if not k.endswith(("_dropout", "_std"))}
        return ", ".join(f"{name} {value}" for name, value in shaping.items())

    @classmethod
    def of(cls, model: "ModelConfig") -> "DecoderShape":
        """The preset with the section's overrides."""
        names = {field.name for field in dataclasses.fields(cls)}
        overrides = {k: v for k, v in vars(model).items() if k in names and v is not None}
        return dataclasses.replace(PRESETS[model.preset], **overrides)


# emu3_8b: Emu3 (arXiv 2409.18869) table 3 and its configuration_emu3.py; emu3_5_34b: Emu3.5 (arXiv 2510.26583) table 1.
PRESETS = {
    "tiny": DecoderShape(
        num_layers=4, hidden_size=256, ffn_hidden_size=704, num_attention_heads=4, num_query_groups=2, kv_channels=64
    ),
    "emu3_8b": DecoderShape(
        num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
        kv_channels=128
    ),
    "emu3_5_34b": DecoderShape(
        num_layers=64, hidden_size=5120, ffn_hidden_size=25600, num_attention_heads=64, num_query_groups=8,
        kv_channels=128, qk_layernorm=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section, section="model"):
    """Shape of the decoder: a preset, and what to change in it."""

    preset: Literal["tiny", "emu3_8b", "emu3_5_34b"] = "tiny"
    """Shape to start from; emu3_8b and emu3_5_34b are the published ones."""

    num_layers: Count | None = None
    """Decoder layers; empty keeps the preset's."""

    hidden_size: Count | None = None
    """Width of the residual stream; empty keeps the preset's."""

    ffn_hidden_size: Count | None = None
    """Inner width of the SwiGLU MLP; empty keeps the preset's."""

    num_attention_heads: Count | None = None
    """Query heads; empty keeps the preset's."""

    num_query_groups: Count | None = None
    """Key-value heads (grouped-query attention); empty keeps the preset's."""

    kv_channels: Even | None = None
    """Channels per head, which rotary frequencies turn in pairs; empty keeps the preset's."""

    qk_layernorm: bool | None = None
    """RMSNorm on each head's queries and keys (Emu3.5); empty keeps the preset's."""

    rotary_base: Positive | None = None
    """Base of the rotary frequencies; empty keeps the preset's 1e6."""

    attention_dropout: Decay | None = None
    """Dropout probability on attention weights; empty keeps the preset's 0.1."""

    hidden_dropout: Decay | None = None
    """Dropout probability on embeddings and on both residual branches; empty keeps the preset's 0.1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        DecoderShape.of(self)

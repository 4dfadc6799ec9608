"""Shape of the decoder: what its weights, its cost and its memory follow from. No torch: a plan needs none."""

import dataclasses
from dataclasses import dataclass

from megatron_ext.config.errors import InputError
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.runtime import FP8_MULTIPLES


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

    @property
    def identity(self) -> str:
        """What weights of this shape fit: every field that decides a tensor's size or meaning, as text."""
        shaping = {k: v for k, v in vars(self).items() if not k.endswith(("_dropout", "_std"))}
        return ", ".join(f"{name} {value}" for name, value in shaping.items())

    @classmethod
    def of(cls, model: ModelConfig) -> "DecoderShape":
        """The preset with the section's overrides. Raises InputError for a shape that cannot be built."""
        names = {field.name for field in dataclasses.fields(cls)}
        overrides = {k: v for k, v in vars(model).items() if k in names and v is not None}
        shape = dataclasses.replace(PRESETS[model.preset], **overrides)
        if shape.num_attention_heads % shape.num_query_groups:
            raise InputError(
                f"model.num_attention_heads {shape.num_attention_heads} is not a multiple of "
                f"model.num_query_groups {shape.num_query_groups}: change one of them"
            )
        return shape

    def faults_of(self, tensor_parallel_size: int, fp8_recipe: str | None = None) -> list[str]:
        """What keeps the shape from running on a tensor axis and in 8 bits: one message each, with its fix."""
        faults = [
            f"model.{name} {getattr(self, name)} is not a multiple of parallel.tensor_model_parallel_size "
            f"{tensor_parallel_size}: change one of them"
            for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size")
            if getattr(self, name) % tensor_parallel_size
        ]
        if faults or fp8_recipe is None:
            return faults
        multiple = FP8_MULTIPLES[fp8_recipe]
        widths = {
            "model.hidden_size": self.hidden_size,
            "model.ffn_hidden_size / parallel.tensor_model_parallel_size": self.ffn_hidden_size // tensor_parallel_size,
            "model.num_attention_heads x model.kv_channels / parallel.tensor_model_parallel_size": (
                self.num_attention_heads * self.kv_channels // tensor_parallel_size
            ),
        }
        return [
            f"{name} is {width}, runtime.fp8_recipe {fp8_recipe} needs a multiple of {multiple}: "
            "change the shape or set runtime.precision to bf16"
            for name, width in widths.items()
            if width % multiple
        ]


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


def pad_vocabulary(size: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding and the head: the next multiple of 128 per tensor rank (megatron-core's divisor)."""
    multiple = 128 * tensor_parallel_size
    return -(-size // multiple) * multiple

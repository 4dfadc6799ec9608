"""The decoder: megatron-core's GPTModel with the shapes of Emu3, and the attention it needs on a CPU."""

from megatron_ext.model.emu3 import PRESETS, DecoderShape, Emu3Model, build_model, pad_vocabulary

__all__ = ["PRESETS", "DecoderShape", "Emu3Model", "build_model", "pad_vocabulary"]

"""The decoder: megatron-core's GPTModel with the shapes of Emu3, and the attention it needs on a CPU."""

from megatron_ext.model.emu3 import Emu3Model, build_model

__all__ = ["Emu3Model", "build_model"]

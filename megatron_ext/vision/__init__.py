"""The Emu3 vision tokenizer: pictures and clips to visual codes and back; no losses, no training."""

from megatron_ext.vision.movqgan import CodesOrigin, MoVQGAN
from megatron_ext.vision.pixels import from_uint8, to_uint8
from megatron_ext.vision.shape import VisionTokenizerConfig
from megatron_ext.vision.storage import load_vision_tokenizer, save_vision_tokenizer

__all__ = [
    "CodesOrigin",
    "MoVQGAN",
    "VisionTokenizerConfig",
    "from_uint8",
    "load_vision_tokenizer",
    "save_vision_tokenizer",
    "to_uint8",
]

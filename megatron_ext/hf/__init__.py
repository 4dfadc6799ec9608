"""Hugging Face: every conversion is a table of rules; folders are written whole and read tensor by tensor.

`release`, which writes them, is imported on its own: it needs transformers, and training does not.
"""

from megatron_ext.hf.convert import (
    decoder_tensors,
    is_hf_folder,
    load_any_vision_tokenizer,
    load_decoder_weights,
    load_vision_from_hf,
    model_section,
    read_config,
    read_decoder,
    read_decoder_tensors,
    read_shape,
    read_vocabulary,
    vision_tensors,
)

__all__ = [
    "decoder_tensors",
    "is_hf_folder",
    "load_any_vision_tokenizer",
    "load_decoder_weights",
    "load_vision_from_hf",
    "model_section",
    "read_config",
    "read_decoder",
    "read_decoder_tensors",
    "read_shape",
    "read_vocabulary",
    "vision_tensors",
]

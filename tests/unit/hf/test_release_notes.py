"""A release says where its weights were rounded before they were written in a wider type."""

import torch

from megatron_ext.checkpoint.lazy import LazyTensor
from megatron_ext.config.model import ModelConfig
from megatron_ext.hf.contents import Source
from megatron_ext.hf.decoder import Decoder
from megatron_ext.hf.release import _about_rounding
from megatron_ext.plan import DecoderShape
from megatron_ext.vocab import VocabLayout


def source(dtype: torch.dtype) -> Source:
    tensors = {"decoder.final_layernorm.weight": LazyTensor.of(torch.ones(2, dtype=dtype))}
    decoder = Decoder(shape=DecoderShape.of(ModelConfig(preset="tiny")), layout=VocabLayout.emu3(), tensors=tensors)
    return Source(decoder=decoder, vocabulary=None, vision=None, max_position_embeddings=8, provenance={})


def test_only_rounded_weights_in_a_wider_type_are_told():
    (note,) = _about_rounding(source(torch.bfloat16), torch.float32)
    assert "the rounded ones (bfloat16)" in note and "fully_reshardable" in note
    assert _about_rounding(source(torch.bfloat16), torch.bfloat16) == []
    assert _about_rounding(source(torch.float32), torch.float32) == []
    assert _about_rounding(source(torch.float32), torch.bfloat16) == []

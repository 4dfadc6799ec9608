"""Generation: prompts to draw and to caption, a sampler bound by the document grammar, one engine with a KV cache."""

from megatron_ext.generate.decoder import CachedDecoder, TextDecoder
from megatron_ext.generate.engine import generate
from megatron_ext.generate.prompts import Prompt, captioning_prompt, document_of, drawing_prompt
from megatron_ext.generate.sampling import SamplingConfig

__all__ = [
    "CachedDecoder",
    "Prompt",
    "SamplingConfig",
    "TextDecoder",
    "captioning_prompt",
    "document_of",
    "drawing_prompt",
    "generate",
]

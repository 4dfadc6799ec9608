"""Vocabulary and documents: which id means what, and how texts, pictures and clips become ids. numpy only."""

from megatron_ext.vocab.document import (
    DocumentError,
    Grid,
    Image,
    Segment,
    Text,
    Video,
    decode_document,
    encode_block_start,
    encode_document,
    segment_spans,
    spans,
)
from megatron_ext.vocab.grammar import Grammar, State, Violation
from megatron_ext.vocab.layout import VocabLayout
from megatron_ext.vocab.sweep import IdCounts, Sweep
from megatron_ext.vocab.text import QwenTokenizer, SentencePieceTokenizer, TextTokenizer
from megatron_ext.vocab.vocabulary import Vocabulary, layout_of

__all__ = [
    "DocumentError",
    "Grammar",
    "Grid",
    "IdCounts",
    "Image",
    "QwenTokenizer",
    "Segment",
    "SentencePieceTokenizer",
    "State",
    "Sweep",
    "Text",
    "TextTokenizer",
    "Video",
    "Violation",
    "VocabLayout",
    "Vocabulary",
    "decode_document",
    "encode_block_start",
    "encode_document",
    "layout_of",
    "segment_spans",
    "spans",
]

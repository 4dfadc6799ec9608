"""What goes into a release and what a format makes of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.lazy import LazyTensor
from megatron_ext.checkpoint.open import describe_checkpoint
from megatron_ext.checkpoint.streaming import read_weights
from megatron_ext.hf.decoder import Decoder
from megatron_ext.hf.provenance import provenance_of
from megatron_ext.plan import DecoderShape
from megatron_ext.vision import MoVQGAN, load_vision_tokenizer
from megatron_ext.vocab import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a release is made of."""

    decoder: Decoder
    vocabulary: Vocabulary
    vision: MoVQGAN | None
    """None leaves the vision tokenizer out, where the format allows it."""

    max_position_embeddings: int
    """How far positions have been seen."""

    provenance: Mapping[str, Any]
    """What `provenance_of` returns."""

    @classmethod
    def of_checkpoint(
        cls, checkpoint: str | Path, vision_tokenizer: str | Path | None, *, exact: bool = False
    ) -> "Source":
        """A checkpoint (see `describe_checkpoint`) and the folder of the vision tokenizer of its data.

        The decoder's weights stay on disk until they are asked for; `exact`: the fp32 master weights, where the
        checkpoint has them by name.

        Raises:
            InputError: either cannot be read, or they do not belong together.
        """
        described = describe_checkpoint(checkpoint)
        vision = None if vision_tokenizer is None else load_vision_tokenizer(vision_tokenizer)
        if vision is not None:
            described.check_vision_tokenizer(vision.identity, vision.config.codebook_size)
        decoder = Decoder(
            shape=DecoderShape.of(described.section),
            layout=described.vocab.layout,
            tensors=read_weights(described.folder, exact=exact),
        )
        return cls(
            decoder=decoder,
            vocabulary=described.vocab,
            vision=vision,
            max_position_embeddings=described.seq_length,
            provenance=provenance_of(described.folder),
        )


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a format puts into a folder."""

    config: dict[str, Any]
    """config.json."""

    weights: Iterable[tuple[str, LazyTensor]]
    """(name, tensor) in the order of the files."""

    files: Mapping[str, bytes | dict[str, Any]]
    """Other files by name: bytes, or what is written as JSON."""

    vision_files: Mapping[str, bytes | dict[str, Any]] | None = None
    """Files beside the weights in vision_tokenizer/; None: the vision tokenizer has no folder of its own."""

    usage: str
    """Python that loads the folder, for the model card."""

    warning: str | None = None
    """What goes wrong in silence, in Markdown: the first thing that the model card says."""

    notes: tuple[str, ...]
    """What to know, and what the format cannot hold, in sentences."""

    front: dict[str, Any] = field(default_factory=dict)
    """Fields of the hub's front matter that depend on the format."""

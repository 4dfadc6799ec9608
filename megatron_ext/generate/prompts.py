"""What to begin with and where to stop: a caption to draw, a picture to describe."""

from dataclasses import dataclass

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.vocab import (
    Grid,
    Image,
    Segment,
    Video,
    Vocabulary,
    decode_document,
    encode_block_start,
    encode_document,
)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One sequence to continue."""

    ids: np.ndarray
    """int32 [N], from BOS on."""

    unconditional: np.ndarray | None = None
    """int32 [M]: what guidance moves away from, ending in the same state of the grammar; None: no guidance."""

    stop: int
    """The id after which the sequence is finished."""

    forbidden: tuple[int, ...] = ()
    """Ids that are not to be drawn although a document could go on with them."""

    max_new_ids: int
    """Most ids to draw, the stop included; the grammar sees to it that the document ends within them."""

    sample: int = 0
    """Number of this sample: with the seed it decides the random numbers."""


def drawing_prompt(
    caption: str, grid: Grid, vocabulary: Vocabulary, *, negative_prompt: str = "", sample: int = 0
) -> Prompt:
    """`[BOS] caption [SOV] meta [SOT]`, to be continued until EOV (E3 processing_emu3.py:177-183).

    The unconditional sequence has the negative prompt, possibly none, in the caption's place.
    """
    start = encode_block_start(grid, vocabulary)

    def sequence(text: str) -> np.ndarray:
        return np.concatenate([[vocabulary.layout.bos], vocabulary.text.encode(text), start]).astype(np.int32)

    return Prompt(
        ids=sequence(caption),
        unconditional=sequence(negative_prompt),
        stop=vocabulary.layout.eov,
        # The grammar's room counts EOS, which is never drawn here.
        max_new_ids=grid.body_length(vocabulary.block) + 1,
        sample=sample,
    )


def captioning_prompt(picture: Image | Video, vocabulary: Vocabulary, *, max_new_ids: int, sample: int = 0) -> Prompt:
    """`[BOS] block`, to be continued with text until EOS.

    Raises:
        InputError: no room for EOS.
    """
    if max_new_ids < 1:
        raise InputError(f"max_new_ids is {max_new_ids}: a caption needs at least 1, for EOS")
    document = encode_document([picture], vocabulary)
    return Prompt(
        ids=document[:-1],
        stop=vocabulary.layout.eos,
        forbidden=(vocabulary.layout.sov,),
        max_new_ids=max_new_ids,
        sample=sample,
    )


def document_of(prompt: Prompt, new_ids: np.ndarray, vocabulary: Vocabulary) -> tuple[Segment, ...]:
    """The segments of a prompt and its continuation; what was generated is the last of them."""
    ids = np.concatenate([prompt.ids, new_ids])
    if ids[-1] != vocabulary.layout.eos:
        ids = np.append(ids, vocabulary.layout.eos)
    return decode_document(ids.astype(np.int32), vocabulary)

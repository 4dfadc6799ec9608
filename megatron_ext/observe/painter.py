"""Codes of pictures and clips as something to look at, and documents with them in their places.

Shape suffixes: T frames of codes, H rows, W columns; C channels.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image as Picture

from megatron_ext.data.report import excerpt
from megatron_ext.observe.elements import Shown, Token, Words
from megatron_ext.vision import MoVQGAN, to_uint8
from megatron_ext.vocab import Image, Segment, Text, Video, Vocabulary

LARGEST = 512
"""Pixels of a side on a page."""

FRAMES = 4
"""Frames of a clip on a page, evenly spread."""


class Painter:
    """Draws codes: by the vision tokenizer they belong to, or, without it, each code as a colour of its own."""

    def __init__(self, vision: MoVQGAN | None) -> None:
        self.vision = vision

    def draw(self, code_HW: np.ndarray) -> np.ndarray:
        """uint8 [H, W, C]: a picture, or the first of those that a frame of a clip's codes stands for."""
        if self.vision is None:
            # Neighbouring codes are as unlike as any two: colours are drawn, not ordered (Knuth's multiplicative hash).
            drawn = code_HW.astype(np.uint64) * np.uint64(2654435761)
            return np.stack([(drawn >> np.uint64(shift)) & np.uint64(255) for shift in (8, 16, 24)], -1).astype(
                np.uint8
            )
        device = next(self.vision.parameters()).device
        # One by one, as MoVQGAN.decode_chunks does, which would also draw the other pictures of each chunk.
        with torch.inference_mode():
            return to_uint8(self.vision.decode(torch.from_numpy(code_HW)[None].long().to(device))[0])

    def frames(self, media: Image | Video) -> np.ndarray:
        """uint8 [T, H, W, C]: one picture per frame of codes."""
        codes = media.codes_HW[None] if isinstance(media, Image) else media.codes_THW
        return np.stack([self.draw(code_HW) for code_HW in codes])

    def shown(self, media: Image | Video) -> Iterator[Shown]:
        """A picture, or some frames of a clip, for a page."""
        if isinstance(media, Image):
            rows, columns = media.codes_HW.shape
            yield self._shown(media.codes_HW, f"{rows} rows of {columns} codes")
            return
        frames = len(media.codes_THW)
        for number in spread(frames, FRAMES):
            yield self._shown(media.codes_THW[number], f"frame {number + 1} of {frames}")

    def _shown(self, code_HW: np.ndarray, caption: str) -> Shown:
        picture = Picture.fromarray(self.draw(code_HW))
        picture.thumbnail((LARGEST, LARGEST))
        return Shown(picture, caption, is_codes=self.vision is None)


def items_of(
    segments: Sequence[Segment], vocabulary: Vocabulary, painter: Painter, longest_text: int
) -> Iterator[Token | Words | Shown]:
    """A document's ids from BOS to EOS: ids of structure by their names, texts, pictures where their codes stand."""
    token = {role: _token(role, vocabulary) for role in ("bos", "eos", "sov", "sot", "eov", "eol", "eof")}
    yield token["bos"]
    for segment in segments:
        if isinstance(segment, Text):
            yield Words(excerpt(vocabulary.text.decode(segment.ids), longest_text))
            continue
        yield from (token["sov"], Words(segment.grid.meta), token["sot"])
        yield from painter.shown(segment)
        ends = segment.grid.height if vocabulary.block.frame_ends else segment.grid.height - 1
        yield Token(f"{ends * segment.grid.frames} × EOL", token["eol"].title)
        if vocabulary.block.frame_ends:
            yield Token(f"{segment.grid.frames} × EOF", token["eof"].title)
        yield token["eov"]
    yield token["eos"]


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0..count - 1, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def _token(role: str, vocabulary: Vocabulary) -> Token:
    token_id = getattr(vocabulary.layout, role)
    return Token(role.upper(), f"id {token_id:,}, {vocabulary.layout.token_string(token_id)}")

"""Documents drawn to look like those of Emu3's two stages. Their mix is unpublished: shares and texts are ours.

Pictures have Emu3's lengths: about 512 x 512 pixels of any common ratio, one code for 8 x 8, a row end after each row,
and a caption before it. Clips are 4 to 40 frames of codes. Texts are log-normal: median 545 ids, mean 1,000.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from megatron_ext.data.packing import Spans

RATIOS = (9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9)
"""Width by height of pictures, equally often."""

PIXELS = 512 * 512
CODE_PIXELS = 8

CHUNK = 1 << 20
"""Documents drawn at once, so that drawing many takes little memory."""


@dataclass(frozen=True)
class Mix:
    """Shares of kinds of documents in a window length."""

    name: str
    seq_length: int
    pictures: float
    clips: float = 0.0


MIXES = (
    Mix("stage 1, texts", 5_120, pictures=0.1),
    Mix("stage 1, even", 5_120, pictures=0.5),
    Mix("stage 1, pictures", 5_120, pictures=0.9),
    Mix("stage 2, texts", 131_072, pictures=0.2, clips=0.01),
    Mix("stage 2, even", 131_072, pictures=0.5, clips=0.05),
    Mix("stage 2, clips", 131_072, pictures=0.3, clips=0.3),
)


@dataclass(frozen=True)
class Drawn:
    """N documents of a mix: [BOS] caption, then pictures or frames, [EOS]; a text is all caption."""

    lengths: np.ndarray  # int32 [N]
    captions: np.ndarray  # int32 [N]: ids before the first frame's span
    frames: np.ndarray  # int16 [N]: a picture is one; texts have none
    frame_ids: np.ndarray  # int32 [N]: ids of a frame

    def spans(self, documents: np.ndarray) -> Spans:
        """The spans of some documents."""
        documents = documents[self.frames[documents] > 0]
        frames = self.frames[documents].astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(frames)])
        owner = np.repeat(documents, frames)
        number = np.arange(offsets[-1]) - np.repeat(offsets[:-1], frames)
        head = 8  # start of vision, meta, start of tokens: with the first frame; end of vision: with the last
        start = self.captions[owner] + np.where(number == 0, 0, head + number * self.frame_ids[owner])
        is_last = number == np.repeat(frames, frames) - 1
        end = self.captions[owner] + head + (number + 1) * self.frame_ids[owner] + is_last
        return Spans(documents.astype(np.uint32), offsets, np.stack([start, end], axis=1).astype(np.int32))


def draw(mix: Mix, count: int, seed: int) -> Drawn:
    """`count` documents."""
    chunks = list(_chunks(mix, count, seed))
    return Drawn(*(np.concatenate([getattr(chunk, column.name) for chunk in chunks]) for column in fields(Drawn)))


def draw_lengths(mix: Mix, count: int, seed: int) -> tuple[np.ndarray, Spans]:
    """The lengths of the same documents and the spans of those longer than a window, without memory for more."""
    lengths, spans, first = np.empty(count, np.int32), [], 0
    for chunk in _chunks(mix, count, seed):
        lengths[first : first + len(chunk.lengths)] = chunk.lengths
        own = chunk.spans(np.flatnonzero(chunk.lengths > mix.seq_length))
        spans.append(Spans(own.documents + np.uint32(first), np.diff(own.offsets), own.bounds))
        first += len(chunk.lengths)
    counts = np.concatenate([own.offsets for own in spans])
    return lengths, Spans(
        np.concatenate([own.documents for own in spans]),
        np.concatenate([[0], np.cumsum(counts)]),
        np.concatenate([own.bounds for own in spans]),
    )


def _chunks(mix: Mix, count: int, seed: int) -> Iterator[Drawn]:
    rng = np.random.default_rng(seed)
    rows = np.round(np.sqrt(PIXELS / np.array(RATIOS)) / CODE_PIXELS).astype(np.int32)
    widths = np.round(np.sqrt(PIXELS * np.array(RATIOS)) / CODE_PIXELS).astype(np.int32)
    by_ratio = rows * (widths + 1) + 1  # a row end after each row, a frame end
    for first in range(0, count, CHUNK):
        size = min(CHUNK, count - first)
        kind = rng.random(size, dtype=np.float32)
        is_clip, is_picture = kind < mix.clips, (kind >= mix.clips) & (kind < mix.clips + mix.pictures)
        frames = np.where(is_clip, rng.integers(4, 41, size), is_picture).astype(np.int16)
        frame_ids = np.where(is_clip, 64 * 65 + 1, by_ratio[rng.integers(0, len(RATIOS), size)]).astype(np.int32)
        captions = 1 + np.minimum(rng.lognormal(4.2, 0.6, size), 400).astype(np.int32)
        texts = np.maximum(3, rng.lognormal(6.3, 1.1, size)).astype(np.int32)
        lengths = np.where(frames > 0, captions + 8 + frames * frame_ids + 2, texts).astype(np.int32)
        yield Drawn(lengths, captions, frames, frame_ids)

"""The Emu3 document format: typed segments <-> ids. Nothing else defines it.

    document = BOS segment... EOS              at least one segment, no two texts in a row
    segment  = text ids | block
    block    = SOV meta SOT frame... EOV
    frame    = (H rows of W visual ids, EOL after each) EOF

A picture is a clip of one frame whose meta is Emu3's `H*W`: height and width of the grid of visual ids, in text ids
(Emu3 section 2.4; baaivision/Emu3 @ f6ea9aa, emu3/mllm/processing_emu3.py:166-174). Emu3's meta for clips is
unpublished ("resolution, frame rate and duration"); ours is `T*H*W*R*D`: frames of visual ids, height, width, pictures
per 1000 seconds as they were sampled from the source for encoding, and the milliseconds that these cover. A number is
1..999999999, without leading zeros.
Emu3.5 joins rows by EOL, has no EOF, and no clips (baaivision/Emu3.5 @ 8fcf1da, src/utils/input_utils.py:21-40).

Text segments hold ids, not strings: captions, prose and prompts are encoded by the vocabulary's text tokenizer.

Shape suffixes: N ids; T frames, H rows, W columns of visual codes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_ext.config import InputError

if TYPE_CHECKING:
    from megatron_ext.vocab.vocabulary import Vocabulary

DIGITS = "0123456789"
SEPARATOR = "*"
META_CHARACTERS = DIGITS + SEPARATOR
MAX_DIGITS = 9
META_END = "end"
"""What `meta_continuations` names beside characters: the meta is complete, SOT may follow."""
ANY_VISUAL = -1
"""Where `Grid.expected_ids` wants a visual id of any code."""


class DocumentError(InputError):
    """Ids that are no document: `position` is the first id that cannot stand where it does, `reason` says why."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"not a document at position {position}: {reason}")
        self.position = position
        self.reason = reason

    def __reduce__(self) -> tuple:
        # Worker processes send it back to their parent.
        return DocumentError, (self.position, self.reason)


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """In what the layouts' picture blocks differ."""

    frame_ends: bool
    """EOL after the last row and EOF after each frame (Emu3); without them a block holds one frame (Emu3.5)."""

    @property
    def metas(self) -> tuple[int, ...]:
        """How many numbers a meta may have: 2 is a picture, 5 a clip."""
        return (2, 5) if self.frame_ends else (2,)


@dataclass(frozen=True)
class Grid:
    """What a meta says: the shape of a block's visual ids; for a clip also the timing of what was encoded."""

    frames: int
    height: int
    width: int
    frame_rate_mhz: int | None = None
    duration_ms: int | None = None

    def __post_init__(self) -> None:
        """Raise InputError for a number that no meta can hold."""
        if not all(0 < number < 10**MAX_DIGITS for number in self._numbers):
            raise InputError(f"{self} has a number outside 1..{10**MAX_DIGITS - 1}")

    @property
    def _numbers(self) -> tuple[int, ...]:
        timing = (self.frame_rate_mhz, self.duration_ms) if self.is_clip else ()
        return (self.frames, self.height, self.width, *timing)

    @property
    def is_clip(self) -> bool:
        """A clip of one frame is still a clip."""
        return self.frame_rate_mhz is not None

    @classmethod
    def parse(cls, meta: str) -> "Grid":
        """The grid of a complete meta (see `meta_continuations`)."""
        numbers = [int(number) for number in meta.split(SEPARATOR)]
        return cls(*numbers) if len(numbers) == 5 else cls(1, *numbers)

    @property
    def meta(self) -> str:
        """The meta text; `parse` is its inverse."""
        return SEPARATOR.join(str(number) for number in (self._numbers if self.is_clip else self._numbers[1:]))

    @property
    def codes(self) -> int:
        """Visual ids in the block."""
        return self.frames * self.height * self.width

    def frame_length(self, block: BlockFormat) -> int:
        """Ids of one frame: codes, an EOL per row (one fewer without frame ends), EOF."""
        return self.height * (self.width + 1) + (1 if block.frame_ends else -1)

    def body_length(self, block: BlockFormat) -> int:
        """Ids after SOT: all frames and EOV."""
        return self.frames * self.frame_length(block) + 1

    def expected_ids(self, offset_N: np.ndarray, vocabulary: "Vocabulary") -> np.ndarray:
        """int32: the id that must stand at each offset after SOT, ANY_VISUAL where any code may.

        Offsets are int64 in `[0, body_length)`.
        """
        layout, block = vocabulary.layout, vocabulary.block
        in_frame_N = offset_N % self.frame_length(block)
        expected_N = np.where(in_frame_N % (self.width + 1) == self.width, layout.eol, ANY_VISUAL)
        if block.frame_ends:
            expected_N[in_frame_N == self.frame_length(block) - 1] = layout.eof
        expected_N[offset_N == self.body_length(block) - 1] = layout.eov
        return expected_N.astype(np.int32)


def meta_continuations(meta: str, block: BlockFormat) -> str | tuple[str, ...]:
    """The characters that may follow the beginning `meta` of a meta, and META_END where it may end."""
    numbers = meta.split(SEPARATOR)
    last = numbers[-1]
    if not last:
        return tuple(DIGITS[1:])
    following = tuple(DIGITS) if len(last) < MAX_DIGITS else ()
    if len(numbers) < max(block.metas):
        following += (SEPARATOR,)
    if len(numbers) in block.metas:
        following += (META_END,)
    return following


class _Segment:
    """Equality by content, also of arrays."""

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(np.array_equal(value, vars(other)[name]) for name, value in vars(self).items())

    __hash__ = None


@dataclass(frozen=True, eq=False)
class Text(_Segment):
    """A run of text ids [N], N >= 1."""

    ids: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", _array(self.ids, 1, "Text.ids"))


@dataclass(frozen=True, eq=False)
class Image(_Segment):
    """A picture's codebook indices [H, W]."""

    codes_HW: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes_HW", _array(self.codes_HW, 2, "Image.codes_HW"))

    @property
    def grid(self) -> Grid:
        """Its shape, as the meta tells it."""
        return Grid(1, *self.codes_HW.shape)


@dataclass(frozen=True, eq=False)
class Video(_Segment):
    """A clip's codebook indices [T, H, W], and of the frames that were encoded: how many per 1000 seconds, and the
    milliseconds they cover."""

    codes_THW: np.ndarray
    frame_rate_mhz: int
    duration_ms: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes_THW", _array(self.codes_THW, 3, "Video.codes_THW"))

    @property
    def grid(self) -> Grid:
        """Its shape and timing, as the meta tells them."""
        return Grid(*self.codes_THW.shape, int(self.frame_rate_mhz), int(self.duration_ms))


Segment = Text | Image | Video


def encode_document(segments: Sequence[Segment], vocabulary: "Vocabulary") -> np.ndarray:
    """int32 ids [N] of a document, BOS and EOS included.

    Raises:
        InputError: no segment, two texts in a row, ids or codes out of range, a clip in a layout without clips.
    """
    if not segments:
        raise InputError("a document needs at least one segment")
    parts = [np.array([vocabulary.layout.bos])]
    for index, segment in enumerate(segments):
        if not isinstance(segment, Text):
            parts += _encode_block(segment, vocabulary)
            continue
        if index and isinstance(segments[index - 1], Text):
            raise InputError(f"segments {index - 1} and {index} are both Text: join them into one")
        if not vocabulary.is_text(segment.ids).all():
            first = segment.ids[~vocabulary.is_text(segment.ids)][0]
            raise InputError(f"segment {index} is Text but holds {vocabulary.describe(int(first))}")
        parts.append(segment.ids)
    parts.append(np.array([vocabulary.layout.eos]))
    return np.concatenate(parts).astype(np.int32)


def encode_block_start(grid: Grid, vocabulary: "Vocabulary") -> np.ndarray:
    """int32 ids `SOV meta SOT`: what a prompt ends with when a picture or clip of this grid is wanted.

    Raises:
        InputError: a clip in a layout without clips.
    """
    if grid.is_clip and not vocabulary.block.frame_ends:
        raise InputError(f"layout {vocabulary.layout.name} has no video: tokenize single frames as pictures")
    meta = [vocabulary.meta_ids[character] for character in grid.meta]
    return np.array([vocabulary.layout.sov, *meta, vocabulary.layout.sot], dtype=np.int32)


def _encode_block(segment: Image | Video, vocabulary: "Vocabulary") -> tuple[np.ndarray, np.ndarray]:
    grid = segment.grid
    codes = segment.codes_HW if isinstance(segment, Image) else segment.codes_THW
    start_N = encode_block_start(grid, vocabulary)
    body_N = grid.expected_ids(np.arange(grid.body_length(vocabulary.block)), vocabulary)
    body_N[body_N == ANY_VISUAL] = vocabulary.layout.code_to_id(codes).ravel()
    return start_N, body_N


def decode_document(ids_N: np.ndarray, vocabulary: "Vocabulary") -> tuple[Segment, ...]:
    """The segments of a document's ids; the inverse of `encode_document`.

    Raises:
        DocumentError: the ids are no document; it names the first position at fault and the reason.
    """
    ids_N = _id_array(ids_N)
    segments: list[Segment] = []
    for start, stop, body, grid in _segments(ids_N, vocabulary):
        if grid is None:
            segments.append(Text(ids_N[start:stop]))
            continue
        body_N = ids_N[body:stop]
        codes = vocabulary.layout.id_to_code(body_N[vocabulary.layout.is_visual(body_N)])
        if grid.is_clip:
            codes_THW = codes.reshape(grid.frames, grid.height, grid.width)
            segments.append(Video(codes_THW, grid.frame_rate_mhz, grid.duration_ms))
        else:
            segments.append(Image(codes.reshape(grid.height, grid.width)))
    return tuple(segments)


def spans(ids_N: np.ndarray, vocabulary: "Vocabulary") -> np.ndarray:
    """int64 [spans, 2]: the `[start, stop)` that a window must hold whole or not at all.

    A picture's span is its block, SOV to EOV. A clip has one span per frame; the first begins with SOV meta SOT, the
    last ends with EOV. Text has none: it may be cut anywhere.

    Raises:
        DocumentError: the ids are no document.
    """
    unbreakable = []
    for start, stop, body, grid in _segments(_id_array(ids_N), vocabulary):
        if grid is None:
            continue
        unbreakable.append(_frame_spans(start, body, stop, grid, vocabulary))
    return np.concatenate(unbreakable) if unbreakable else np.empty((0, 2), dtype=np.int64)


def segment_spans(segments: Sequence[Segment], vocabulary: "Vocabulary") -> np.ndarray:
    """The `spans` of the document that `encode_document` makes of these segments."""
    unbreakable = [np.empty((0, 2), dtype=np.int64)]
    start = 1
    for segment in segments:
        if isinstance(segment, Text):
            start += len(segment.ids)
            continue
        grid = segment.grid
        body = start + len(grid.meta) + 2  # SOV, one id per character, SOT
        stop = body + grid.body_length(vocabulary.block)
        unbreakable.append(_frame_spans(start, body, stop, grid, vocabulary))
        start = stop
    return np.concatenate(unbreakable)


def _frame_spans(start: int, body: int, stop: int, grid: Grid, vocabulary: "Vocabulary") -> np.ndarray:
    """int64 [frames, 2]: the spans of the block at `[start, stop)` whose frames begin at `body`."""
    frame_stops = body + grid.frame_length(vocabulary.block) * np.arange(1, grid.frames + 1)
    frame_stops[-1] = stop
    return np.stack([np.concatenate([[start], frame_stops[:-1]]), frame_stops], axis=1)


def _segments(ids_N: np.ndarray, vocabulary: "Vocabulary") -> Iterator[tuple[int, int, int, Grid | None]]:
    """(start, stop, start of the body, grid) of each segment, checked; grid is None for text."""
    layout = vocabulary.layout
    if not ids_N.size:
        raise DocumentError(0, "there are no ids")
    if ids_N[0] != layout.bos:
        raise _unexpected(ids_N, 0, layout.describe(layout.bos), vocabulary)
    text_N = vocabulary.is_text(ids_N)
    position = 1
    while position < len(ids_N):
        if text_N[position]:
            stop = _run_length(text_N[position:]) + position
            yield position, stop, position, None
        elif ids_N[position] == layout.sov:
            body, grid = _read_meta(ids_N, position + 1, vocabulary)
            stop = _check_body(ids_N, body, grid, vocabulary)
            yield position, stop, body, grid
        elif ids_N[position] == layout.eos and position > 1:
            if position + 1 < len(ids_N):
                raise _unexpected(ids_N, position + 1, "nothing after EOS", vocabulary)
            return
        else:
            raise _unexpected(ids_N, position, "text, SOV or EOS" if position > 1 else "text or SOV", vocabulary)
        position = stop
    raise DocumentError(len(ids_N), "the ids end before EOS")


def _read_meta(ids_N: np.ndarray, start: int, vocabulary: "Vocabulary") -> tuple[int, Grid]:
    """Position after SOT, and the grid, of the meta that starts at `start`."""
    characters = {token_id: character for character, token_id in vocabulary.meta_ids.items()}
    characters[vocabulary.layout.sot] = META_END
    meta = ""
    for position in range(start, len(ids_N)):
        character = characters.get(int(ids_N[position]))
        following = meta_continuations(meta, vocabulary.block)
        if character not in following:
            wanted = " ".join(following).replace(META_END, "SOT")
            raise _unexpected(ids_N, position, f"one of {wanted} after meta {meta!r}", vocabulary)
        if character == META_END:
            return position + 1, Grid.parse(meta)
        meta += character
    raise DocumentError(len(ids_N), f"the ids end inside meta {meta!r}")


def _check_body(ids_N: np.ndarray, body: int, grid: Grid, vocabulary: "Vocabulary") -> int:
    """Position after EOV, having compared every id that is there with what the grid demands."""
    layout = vocabulary.layout
    length = grid.body_length(vocabulary.block)
    body_N = ids_N[body : body + length]
    expected_N = grid.expected_ids(np.arange(len(body_N)), vocabulary)
    right_N = np.where(expected_N == ANY_VISUAL, layout.is_visual(body_N), body_N == expected_N)
    if not right_N.all():
        offset = int(right_N.argmin())
        wanted = "a visual id" if expected_N[offset] == ANY_VISUAL else layout.describe(int(expected_N[offset]))
        raise _unexpected(ids_N, body + offset, f"{wanted} at offset {offset} of block {grid.meta}", vocabulary)
    if len(body_N) < length:
        raise DocumentError(len(ids_N), f"block {grid.meta} needs {length} ids after SOT, there are {len(body_N)}")
    return body + length


def _unexpected(ids_N: np.ndarray, position: int, wanted: str, vocabulary: "Vocabulary") -> DocumentError:
    return DocumentError(position, f"expected {wanted}, found {vocabulary.describe(int(ids_N[position]))}")


def _run_length(flags_N: np.ndarray) -> int:
    """How many leading entries are True."""
    return len(flags_N) if flags_N.all() else int(flags_N.argmin())


def _array(values: np.ndarray, dimensions: int, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or array.ndim != dimensions or array.size == 0:
        raise InputError(
            f"{what} must be a non-empty integer array of {dimensions} dimension(s), found {array.dtype} {array.shape}"
        )
    return array


def _id_array(ids_N: np.ndarray) -> np.ndarray:
    ids_N = np.asarray(ids_N)
    if ids_N.ndim != 1 or (ids_N.size and ids_N.dtype.kind not in "iu"):
        raise InputError(f"a document is a 1-dimensional integer array, found {ids_N.dtype} {ids_N.shape}")
    return ids_N

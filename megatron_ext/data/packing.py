"""Documents into windows of a fixed length, best fit, every picture and frame whole.

A document that fits into a window stays whole. A longer one is cut into pieces, only outside its unbreakable spans,
each as long as a window allows. Pieces go by decreasing length into the fullest window that still has room ("best-fit
decreasing"; Ding et al. 2024, arXiv 2404.10830). A document with a span longer than a window cannot be packed: it is
skipped, and listed. With an alignment, a piece takes room up to the next multiple of it; the rest is its padding.

`pack` runs `_packing.cpp`; `pack_reference` says the same in Python and is the oracle of its tests.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from megatron_ext.config import InputError

PACKING_VERSION = 1
"""Raised whenever `pack` gives another result for the same input: cached indexes are keyed by it."""


@dataclass(frozen=True)
class Spans:
    """Unbreakable spans of N documents, M in all, by document and ascending."""

    offsets: np.ndarray  # int64 [N + 1]: spans of document d are bounds[offsets[d] : offsets[d + 1]]
    bounds: np.ndarray  # int32 [M, 2]: first position in the document, and one past the last

    @classmethod
    def join(cls, spans: Sequence[np.ndarray]) -> "Spans":
        """From one (n, 2) array per document."""
        offsets = np.cumsum([0, *(len(bounds) for bounds in spans)], dtype=np.int64)
        joined = np.concatenate([np.empty((0, 2)), *(np.reshape(bounds, (-1, 2)) for bounds in spans)])
        return cls(offsets, joined.astype(np.int32))

    def of(self, document: int) -> np.ndarray:
        """int32 [n, 2]: the spans of one document."""
        return self.bounds[self.offsets[document] : self.offsets[document + 1]]


@dataclass(frozen=True)
class PackedIndex:
    """W windows made of P pieces; the pieces of a window are in document order."""

    window_offsets: np.ndarray  # int64 [W + 1]: pieces of window w are [window_offsets[w], window_offsets[w + 1])
    piece_document: np.ndarray  # int64 [P]
    piece_start: np.ndarray  # int64 [P]: first id of the piece in its document
    piece_length: np.ndarray  # int64 [P]: ids, alignment padding not counted
    skipped_documents: np.ndarray  # int64: documents with a span longer than a window

    def __len__(self) -> int:
        return len(self.window_offsets) - 1

    def fill(self, seq_length: int) -> float:
        """Share of the windows' positions that hold an id of a document."""
        return float(self.piece_length.sum()) / max(1, len(self) * seq_length)

    def arrays(self) -> dict[str, np.ndarray]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def pack(lengths: np.ndarray, spans: Spans, seq_length: int, alignment: int = 1) -> PackedIndex:
    """Pack documents of `lengths` [N] ids into windows of `seq_length` ids.

    Raises:
        InputError: seq_length no multiple of alignment, a document without ids, spans of other documents.
        ImportError: the C++ packer is not built.
    """
    # Here, because training reads packed windows: it runs where nothing was compiled.
    try:
        from megatron_ext.data import _packing
    except ImportError as error:
        raise ImportError(
            "the C++ packer is not built: run `make build` (or `python setup.py build_ext --inplace`)"
        ) from error
    lengths = _checked(lengths, spans, seq_length, alignment)
    offsets = np.ascontiguousarray(spans.offsets, dtype=np.int64)
    bounds = np.ascontiguousarray(spans.bounds, dtype=np.int32)
    return PackedIndex(*_packing.pack(lengths, offsets, bounds, seq_length, alignment))


def pack_reference(lengths: np.ndarray, spans: Spans, seq_length: int, alignment: int = 1) -> PackedIndex:
    """`pack` in plain Python: the definition of its result."""
    lengths = _checked(lengths, spans, seq_length, alignment)
    pieces: list[tuple[int, int, int]] = []  # (document, start, length)
    skipped = []
    for document, length in enumerate(lengths.tolist()):
        cut = _cut(length, spans.of(document).tolist() if length > seq_length else [], seq_length)
        if cut is None:
            skipped.append(document)
        else:
            pieces.extend((document, start, end - start) for start, end in cut)

    windows: list[list[int]] = []
    windows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # ascending keys of windows_by_room
    for piece in sorted(range(len(pieces)), key=lambda piece: -_padded(pieces[piece][2], alignment)):
        need = _padded(pieces[piece][2], alignment)
        place = bisect.bisect_left(rooms, need)
        if place == len(rooms):
            room, window = seq_length, len(windows)
            windows.append([])
        else:  # of several windows with the same room, the one that came to it last
            room = rooms[place]
            window = windows_by_room[room].pop()
            if not windows_by_room[room]:
                del windows_by_room[room], rooms[place]
        windows[window].append(piece)
        if room > need:
            if room - need not in windows_by_room:
                windows_by_room[room - need] = []
                bisect.insort(rooms, room - need)
            windows_by_room[room - need].append(window)

    order = [piece for window in windows for piece in sorted(window)]
    table = np.array([pieces[piece] for piece in order], dtype=np.int64).reshape(-1, 3)
    window_offsets = np.cumsum([0, *(len(window) for window in windows)], dtype=np.int64)
    return PackedIndex(window_offsets, *(table[:, i].copy() for i in range(3)), np.array(skipped, dtype=np.int64))


def _cut(length: int, spans: list[list[int]], seq_length: int) -> list[tuple[int, int]] | None:
    """Pieces [start, end) of a document; None where a span is longer than a window."""
    if length <= seq_length:
        return [(0, length)]
    if any(end - start > seq_length for start, end in spans):
        return None
    pieces = []
    start = 0
    while start < length:
        end = min(start + seq_length, length)
        # A cut inside a span moves back to the span's start; that is past `start`, for the span fits into a window.
        end = next((first for first, last in spans if first < end < last), end)
        pieces.append((start, end))
        start = end
    return pieces


def _padded(length: int, alignment: int) -> int:
    return -(-length // alignment) * alignment


def _checked(lengths: np.ndarray, spans: Spans, seq_length: int, alignment: int) -> np.ndarray:
    """The lengths as contiguous int64; raises InputError where they cannot be packed."""
    if alignment < 1 or seq_length < 1 or seq_length % alignment:
        raise InputError(
            f"data.document_alignment is {alignment} and train.seq_length {seq_length}: "
            "both must be positive and seq_length a multiple of the alignment"
        )
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    if len(spans.offsets) != len(lengths) + 1 or spans.offsets[-1] != len(spans.bounds):
        raise InputError(f"spans describe {len(spans.offsets) - 1} documents, lengths {len(lengths)}")
    if len(lengths) and lengths.min() < 1:
        raise InputError(f"document {int(lengths.argmin())} has no ids")
    return lengths

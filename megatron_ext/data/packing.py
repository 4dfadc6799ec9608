"""Documents into windows of a fixed length, best fit, every picture and frame whole.

A document that fits into a window stays whole. A longer one is cut into pieces, only outside its unbreakable spans,
each as long as a window allows. Every document is drawn into one of the buffers, which are packed one by one: the
buffer's pieces go by decreasing length into the fullest window that still has room ("best-fit decreasing"; Ding et
al. 2024, arXiv 2404.10830). A document with a span longer than a window cannot be packed: it is skipped, and listed.
With an alignment, a piece takes room up to the next multiple of it; the rest is its padding.

With `shortest_cut`, texts (documents without spans) come after all others: each goes whole where there is room. Those
that find none are then, longest first, cut into what room is left, in pieces of at least `shortest_cut` ids, and what
remains of them opens windows. So texts are cut only to fill what pictures leave.

`pack` runs `_packing.cpp`; `pack_reference` says the same in Python and is the oracle of its tests.
"""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from megatron_ext.config import InputError

PACKING_VERSION = 2
"""Raised whenever `pack` gives another result for the same input: cached indexes are keyed by it."""

BUFFER_DOCUMENTS = 1 << 18
"""Documents of a buffer, on average. Its pieces fit into a core's caches, and it fills thousands of windows, of which
few stay open at its end (measured: benchmarks/packing.py)."""

SHORTEST_CUT = 64
"""Ids of the shortest piece that `data.cut_text_to_fill` cuts: a few sentences."""

MOST_DOCUMENTS = 1 << 32
"""A piece names its document in 32 bits."""


@dataclass(frozen=True)
class Spans:
    """Unbreakable spans of the K documents that have any, M in all, by document and ascending."""

    documents: np.ndarray  # uint32 [K], ascending
    offsets: np.ndarray  # int64 [K + 1]: spans of documents[k] are bounds[offsets[k] : offsets[k + 1]]
    bounds: np.ndarray  # int32 [M, 2]: first position in the document, and one past the last

    @classmethod
    def join(cls, spans: Sequence[np.ndarray]) -> "Spans":
        """From one (n, 2) array per document."""
        offsets = np.cumsum([0, *(len(bounds) for bounds in spans)], dtype=np.int64)
        joined = np.concatenate([np.empty((0, 2)), *(np.reshape(bounds, (-1, 2)) for bounds in spans)])
        return cls.select(offsets, joined.astype(np.int32), np.arange(len(spans)))

    @classmethod
    def select(cls, offsets: np.ndarray, bounds: np.ndarray, documents: np.ndarray) -> "Spans":
        """Of some documents, ascending, from those of all: document d has bounds[offsets[d] : offsets[d + 1]]."""
        documents = documents[offsets[documents + 1] > offsets[documents]]
        first, counts = offsets[documents], offsets[documents + 1] - offsets[documents]
        own = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        rows = np.arange(own[-1]) + np.repeat(first - own[:-1], counts)
        return cls(documents.astype(np.uint32), own, np.ascontiguousarray(bounds[rows], dtype=np.int32))

    def of(self, document: int) -> np.ndarray:
        """int32 [n, 2]: the spans of one document."""
        place = int(np.searchsorted(self.documents, document))
        if place == len(self.documents) or self.documents[place] != document:
            return self.bounds[:0]
        return self.bounds[self.offsets[place] : self.offsets[place + 1]]


@dataclass(frozen=True)
class PackedIndex:
    """W windows made of P pieces; the pieces of a window are in document order."""

    window_offsets: np.ndarray  # int64 [W + 1]: pieces of window w are [window_offsets[w], window_offsets[w + 1])
    pieces: np.ndarray  # uint32 [P, 3]: document, first id of the piece in it, ids (alignment padding not counted)
    skipped_documents: np.ndarray  # int64: documents with a span longer than a window

    def __len__(self) -> int:
        return len(self.window_offsets) - 1

    @property
    def piece_document(self) -> np.ndarray:
        """uint32 [P]."""
        return self.pieces[:, 0]

    @property
    def piece_start(self) -> np.ndarray:
        """uint32 [P]: first id of the piece in its document."""
        return self.pieces[:, 1]

    @property
    def piece_length(self) -> np.ndarray:
        """uint32 [P]: ids, alignment padding not counted."""
        return self.pieces[:, 2]

    def fill(self, seq_length: int) -> float:
        """Share of the windows' positions that hold an id of a document."""
        return int(self.piece_length.sum(dtype=np.int64)) / max(1, len(self) * seq_length)

    def cut_documents(self, lengths: np.ndarray) -> np.ndarray:
        """The documents of which no piece is the whole, ascending; `lengths` [N] are the documents'."""
        return np.unique(self.piece_document[self.piece_length < lengths[self.piece_document]])

    def arrays(self) -> dict[str, np.ndarray]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, kw_only=True)
class PackingRules:
    """What decides, beside the documents, how they are packed."""

    seq_length: int
    """Ids of a window."""

    alignment: int = 1
    """A piece takes room up to a multiple of this; a divisor of seq_length."""

    shortest_cut: int = 0
    """Ids of the shortest piece that a text may be cut into to fill a window; 0 cuts only what is longer than one."""

    seed: int = 0
    """Draws the buffer of each document."""

    buffer_documents: int = BUFFER_DOCUMENTS
    """Documents of a buffer, on average; all of them are one buffer where there are no more than this."""

    def __post_init__(self) -> None:
        if self.alignment < 1 or self.seq_length < 1 or self.seq_length % self.alignment:
            raise InputError(
                f"data.document_alignment is {self.alignment} and train.seq_length {self.seq_length}: "
                "both must be positive and seq_length a multiple of the alignment"
            )

    def spanned(self, lengths: np.ndarray) -> np.ndarray:
        """Numbers of the documents whose spans `pack` must know."""
        return np.arange(len(lengths)) if self.shortest_cut else np.flatnonzero(lengths > self.seq_length)


def pack(lengths: np.ndarray, spans: Spans, rules: PackingRules) -> PackedIndex:
    """Pack documents of `lengths` [N] ids; `spans` are those of `rules.spanned`, and may be of more.

    Takes 12 bytes per piece and 8 per window, which are the result, and 24 per document of a buffer; with
    `shortest_cut` up to 12 more per document until their buffer is packed.

    Raises:
        InputError: a document without ids or with more than int32 counts, too many documents, spans of others.
        ImportError: the C++ packer is not built.
    """
    # Here, because training reads packed windows: it runs where nothing was compiled.
    try:
        from megatron_ext.data import _packing
    except ImportError as error:
        raise ImportError(
            "the C++ packer is not built: run `make build` (or `python setup.py build_ext --inplace`)"
        ) from error
    return PackedIndex(
        *_packing.pack(
            _checked(lengths, spans),
            np.ascontiguousarray(spans.documents, dtype=np.uint32),
            np.ascontiguousarray(spans.offsets, dtype=np.int64),
            np.ascontiguousarray(spans.bounds, dtype=np.int32),
            rules.seq_length,
            rules.alignment,
            rules.shortest_cut,
            _num_buffers(len(lengths), rules),
            rules.seed % 2**64,
        )
    )


def pack_reference(lengths: np.ndarray, spans: Spans, rules: PackingRules) -> PackedIndex:
    """`pack` in plain Python: the definition of its result."""
    lengths = _checked(lengths, spans)
    num_buffers = _num_buffers(len(lengths), rules)
    buffers: list[list[_Piece]] = [[] for _ in range(num_buffers)]
    skipped = []
    for document, length in enumerate(lengths.tolist()):
        own = spans.of(document).tolist()
        cut = _cut(length, own, rules.seq_length)
        if cut is None:
            skipped.append(document)
        else:
            buffer = buffers[_draw_buffer(rules.seed, document, num_buffers)]
            buffer.extend(_Piece(document, start, end - start, not own) for start, end in cut)
    windows = [window for buffer in buffers for window in _pack_buffer(buffer, rules)]
    rows = [(piece.document, piece.start, piece.length) for window in windows for piece in window]
    return PackedIndex(
        np.cumsum([0, *(len(window) for window in windows)], dtype=np.int64),
        np.array(rows, dtype=np.uint32).reshape(-1, 3),
        np.array(skipped, dtype=np.int64),
    )


@dataclass
class _Piece:
    document: int
    start: int
    length: int
    is_text: bool

    def units(self, alignment: int) -> int:
        return -(-self.length // alignment)


def _pack_buffer(pieces: list[_Piece], rules: PackingRules) -> list[list[_Piece]]:
    """The windows of one buffer."""
    windows = _OpenWindows(rules.seq_length // rules.alignment, rules.alignment)
    pieces = sorted(pieces, key=lambda piece: -piece.units(rules.alignment))
    if not rules.shortest_cut:
        windows.place(pieces)
    else:
        windows.place(piece for piece in pieces if not piece.is_text)
        waiting = [piece for piece in pieces if piece.is_text and not windows.place_in_room(piece)]
        windows.place([piece for piece in waiting if not windows.cut_into_rooms(piece, rules.shortest_cut)])
    return [sorted(window, key=lambda piece: (piece.document, piece.start)) for window in windows.pieces]


class _OpenWindows:
    """Windows by the room they have, in units of the alignment."""

    def __init__(self, capacity: int, alignment: int):
        self.capacity, self.alignment = capacity, alignment
        self.pieces: list[list[_Piece]] = []
        self.by_room: dict[int, list[int]] = {}
        self.rooms: list[int] = []  # ascending keys of by_room

    def place(self, pieces: Iterable[_Piece]) -> None:
        """Each into the fullest window with room, else into a new one."""
        for piece in pieces:
            if not self.place_in_room(piece):
                self.pieces.append([])
                self._put(piece, len(self.pieces) - 1, self.capacity)

    def place_in_room(self, piece: _Piece) -> bool:
        place = bisect.bisect_left(self.rooms, piece.units(self.alignment))
        if place == len(self.rooms):
            return False
        room = self.rooms[place]
        self._put(piece, self._take(room), room)
        return True

    def cut_into_rooms(self, piece: _Piece, shortest: int) -> bool:
        """Cut heads off a text into the largest rooms until its rest has room; False where it has none in the end."""
        while not self.place_in_room(piece):
            room = self.rooms[-1] if self.rooms else 0
            head = min(room, (piece.length - shortest) // self.alignment) * self.alignment
            if head < shortest:
                return False
            self._put(_Piece(piece.document, piece.start, head, True), self._take(room), room)
            piece.start += head
            piece.length -= head
        return True

    def _take(self, room: int) -> int:
        """Of several windows with the same room, the one that came to it last."""
        window = self.by_room[room].pop()
        if not self.by_room[room]:
            del self.by_room[room]
            self.rooms.remove(room)
        return window

    def _put(self, piece: _Piece, window: int, room: int) -> None:
        self.pieces[window].append(piece)
        room -= piece.units(self.alignment)
        if room > 0:
            if room not in self.by_room:
                self.by_room[room] = []
                bisect.insort(self.rooms, room)
            self.by_room[room].append(window)


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


def _num_buffers(documents: int, rules: PackingRules) -> int:
    return max(1, -(-documents // rules.buffer_documents))


def _draw_buffer(seed: int, document: int, num_buffers: int) -> int:
    """The high bits of SplitMix64's output function (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
    generators") at the document's place."""
    mask = 2**64 - 1
    z = (seed + (document + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return ((z >> 32) * num_buffers) >> 32


def _checked(lengths: np.ndarray, spans: Spans) -> np.ndarray:
    """The lengths as contiguous int32; raises InputError where they cannot be packed."""
    if len(lengths) > MOST_DOCUMENTS:
        raise InputError(f"{len(lengths):,} documents, a dataset may have {MOST_DOCUMENTS:,}: make several of it")
    if len(spans.documents) and int(spans.documents[-1]) >= len(lengths):
        raise InputError(f"spans describe document {spans.documents[-1]}, lengths {len(lengths)} documents")
    if len(lengths) and lengths.min() < 1:
        raise InputError(f"document {int(lengths.argmin())} has no ids")
    if len(lengths) and lengths.max() >= 2**31:
        raise InputError(f"document {int(lengths.argmax())} has {int(lengths.max()):,} ids, more than an int32 counts")
    return np.ascontiguousarray(lengths, dtype=np.int32)

"""A dataset as windows: the packed index, cached on disk, and the ids, labels and mask of each window.

S = seq_length.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.data.indexed import DocumentDataset
from megatron_ext.data.packing import PACKING_VERSION, PackedIndex, PackingRules, pack
from megatron_ext.data.packing_cache import cached_index
from megatron_ext.vocab import Vocabulary


@dataclass(frozen=True)
class Window:
    """One window of S ids."""

    ids: np.ndarray  # int64 [S]: the pieces, each followed by its alignment padding; then padding
    labels: np.ndarray  # int64 [S]: the next id inside the same piece; the padding id where there is none
    mask: np.ndarray  # bool [S]: whether there is a label
    boundaries: np.ndarray  # int64 [n + 1]: 0, the padded end of each piece, and S


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one, in a window."""

    document: int  # its number in the dataset
    start: int  # first id of the document that is here
    length: int  # ids of the document that are here
    begin: int  # where they begin in the window
    end: int  # begin + length and the alignment padding


class PackedDataset:
    """The windows of one indexed dataset; `len` is their number.

    Args:
        prefix: of the indexed dataset.
        vocabulary: it must be the dataset's.
        rules: how documents are packed; S is `rules.seq_length`.
        cache_dir: folder of the packed index, and of what is copied from an object store; None puts the index beside
            the dataset.

    Raises:
        InputError: an incomplete dataset, another vocabulary, nothing to pack, or a cache that cannot be written.
    """

    def __init__(
        self,
        prefix: str | Path,
        vocabulary: Vocabulary,
        rules: PackingRules,
        cache_dir: str | None = None,
    ):
        self.documents = DocumentDataset(prefix, vocabulary, cache_dir)
        self.rules = rules
        self.seq_length = rules.seq_length
        self._pad, self._num_ids = vocabulary.layout.pad, vocabulary.layout.size
        cache = Path(cache_dir) if cache_dir else self.documents.prefix.parent / "packing_cache"
        self.index = cached_index(cache / f"packing-{_digest(self._shape)}", self._shape, self._pack)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, window: int) -> Window:
        ids = np.full(self.seq_length, self._pad, dtype=np.int64)
        labels = ids.copy()
        mask = np.zeros(self.seq_length, dtype=bool)
        boundaries = [0]
        for piece in self.pieces(window):
            last = piece.begin + piece.length - 1
            piece_ids = self.documents.ids(piece.document, piece.start, piece.length)
            ids[piece.begin : last + 1] = piece_ids
            labels[piece.begin : last] = piece_ids[1:]
            mask[piece.begin : last] = True
            boundaries.append(piece.end)
        if not 0 <= ids.min() <= ids.max() < self._num_ids:  # an embedding on a GPU would only say "assert triggered"
            self._name_foreign_id(window)
        if boundaries[-1] < self.seq_length:
            boundaries.append(self.seq_length)
        return Window(ids, labels, mask, np.array(boundaries))

    @property
    def name(self) -> str:
        """Path of the indexed dataset, without suffix."""
        return self.documents.name

    def pieces(self, window: int) -> tuple[Piece, ...]:
        """What a window is made of, in order."""
        if not 0 <= window < len(self):
            raise IndexError(f"window {window} is outside [0, {len(self)})")
        first, last = self.index.window_offsets[window : window + 2].tolist()
        pieces: list[Piece] = []
        begin = 0
        for document, start, length in self.index.pieces[first:last].tolist():
            end = begin - (-length // self.rules.alignment) * self.rules.alignment
            pieces.append(Piece(document, start, length, begin, end))
            begin = end
        return tuple(pieces)

    def _pack(self) -> PackedIndex:
        documents = self.documents
        spanned = self.rules.spanned(documents.lengths)
        index = pack(documents.lengths, documents.sidecar.spans_of(spanned), self.rules)
        if not len(index):
            raise InputError(
                f"no document of {documents.prefix} fits into train.seq_length {self.seq_length}: "
                "each has a picture or frame longer than that"
            )
        return index

    def _name_foreign_id(self, window: int) -> None:
        for piece in self.pieces(window):
            ids = self.documents.ids(piece.document, piece.start, piece.length)
            foreign = (ids < 0) | (ids >= self._num_ids)
            if foreign.any():
                raise InputError(
                    f"{self.documents.prefix}.bin holds id {ids[foreign][0]} in document {piece.document} "
                    f"({self.documents.sidecar.key(piece.document)}), the vocabulary's are 0..{self._num_ids - 1}: "
                    "copy the file again or preprocess again; tools/inspect_data.py --validate true checks all of it"
                )

    def keys(self, window: int) -> tuple[str, ...]:
        """Source keys of a window's pieces, in order."""
        return tuple(self.documents.sidecar.key(piece.document) for piece in self.pieces(window))

    @property
    def fill(self) -> float:
        """Share of the windows' positions that hold an id of a document."""
        # Every id that is not of a skipped document is in one window: the pieces need not be read.
        skipped = int(self.documents.lengths[self.index.skipped_documents].sum(dtype=np.int64))
        return (self.documents.manifest.num_ids - skipped) / (len(self) * self.seq_length)

    @cached_property
    def skipped_keys(self) -> tuple[str, ...]:
        """Source keys of the documents that cannot be packed: a picture or frame of theirs is longer than a window."""
        return tuple(self.documents.sidecar.key(document) for document in self.index.skipped_documents)

    @property
    def identity(self) -> str:
        """Names the sequence of windows: equal identities hold equal windows."""
        return _digest(self._shape)

    @property
    def _shape(self) -> dict[str, int | str]:
        """All that shaped the packed index. Spans follow from ids and vocabulary, so the sidecar is not part of it."""
        manifest = self.documents.manifest
        return {
            "packing_version": PACKING_VERSION,
            "vocabulary": manifest.vocabulary,
            "bin_sha256": manifest.files[".bin"]["sha256"],
            "idx_sha256": manifest.files[".idx"]["sha256"],
            **asdict(self.rules),
        }


def _digest(shape: dict[str, int | str]) -> str:
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:24]

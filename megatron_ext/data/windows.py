"""A dataset as windows: the packed index, cached on disk, and the ids, labels and mask of each window.

S = seq_length.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.data.indexed import DocumentDataset
from megatron_ext.data.packing import PACKING_VERSION, PackedIndex, pack
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
        seq_length: S.
        alignment: pieces are padded at their end to a multiple of this.
        cache_dir: folder of the packed index; None puts it beside the dataset.

    Raises:
        InputError: an incomplete dataset, another vocabulary, nothing to pack, or a cache that cannot be written.
    """

    def __init__(
        self,
        prefix: str | Path,
        vocabulary: Vocabulary,
        seq_length: int,
        alignment: int = 1,
        cache_dir: str | None = None,
    ):
        self.documents = DocumentDataset(prefix, vocabulary)
        self.seq_length = seq_length
        self.alignment = alignment
        self._pad, self._num_ids = vocabulary.layout.pad, vocabulary.layout.size
        folder = Path(cache_dir) if cache_dir else self.documents.prefix.parent / "packing_cache"
        self.index = _cached_index(self.documents, self._shape, folder)

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
        return str(self.documents.prefix)

    def pieces(self, window: int) -> tuple[Piece, ...]:
        """What a window is made of, in order."""
        if not 0 <= window < len(self):
            raise IndexError(f"window {window} is outside [0, {len(self)})")
        pieces: list[Piece] = []
        for piece in range(int(self.index.window_offsets[window]), int(self.index.window_offsets[window + 1])):
            document, start, length = (
                int(column[piece])
                for column in (self.index.piece_document, self.index.piece_start, self.index.piece_length)
            )
            begin = pieces[-1].end if pieces else 0
            pieces.append(Piece(document, start, length, begin, begin - (-length // self.alignment) * self.alignment))
        return tuple(pieces)

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
        return self.index.fill(self.seq_length)

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
            "seq_length": self.seq_length,
            "document_alignment": self.alignment,
        }


def _cached_index(documents: DocumentDataset, shape: dict[str, int | str], cache_dir: Path) -> PackedIndex:
    """The packed index, memory-mapped from the cache, into which it is written first where it is absent.

    Every rank that finds it absent builds it, in a folder of its own that it then renames. The first rename wins, the
    others find the complete folder: no rank waits for another, and nobody sees a half-written index.
    """
    folder = cache_dir / f"packing-{_digest(shape)}"
    if not folder.is_dir():
        index = pack(documents.lengths, documents.sidecar.spans, shape["seq_length"], shape["document_alignment"])
        if not len(index):
            raise InputError(
                f"no document of {documents.prefix} fits into train.seq_length {shape['seq_length']}: "
                "each has a picture or frame longer than that"
            )
        try:
            _write(index, shape, folder)
        except OSError as error:
            raise InputError(
                f"cannot write the packed index into {cache_dir} ({error.strerror}): set data.cache_dir"
            ) from None
    arrays = {}
    for name in (field.name for field in fields(PackedIndex)):
        # An empty file cannot be mapped, and of these only the skipped documents may be none.
        arrays[name] = np.load(folder / f"{name}.npy", mmap_mode=None if name == "skipped_documents" else "r")
    return PackedIndex(**arrays)


def _write(index: PackedIndex, shape: dict[str, int | str], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        for name, array in index.arrays().items():
            np.save(temporary / f"{name}.npy", array)
        (temporary / "shape.json").write_text(json.dumps(shape, indent=1) + "\n")
        os.rename(temporary, folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():  # else another rank was first
            raise


def _digest(shape: dict[str, int | str]) -> str:
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:24]

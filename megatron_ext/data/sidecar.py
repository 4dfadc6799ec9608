"""The sidecar of a dataset: kind, source key and unbreakable spans of each document (PREFIX.spans.npz)."""

import array
import hashlib
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.data.npz import map_npz
from megatron_ext.data.packing import Spans
from megatron_ext.vocab import Segment, Text, Video

KINDS = ("text", "image", "video", "interleaved")
"""Kinds of documents: only text; one picture; one clip (each with or without text); several of them."""

_CHUNK = 1 << 20  # entries at a time


def document_kind(segments: Sequence[Segment]) -> str:
    """Which of KINDS a document is."""
    media = [segment for segment in segments if not isinstance(segment, Text)]
    if not media:
        return "text"
    if len(media) > 1:
        return "interleaved"
    return "video" if isinstance(media[0], Video) else "image"


@dataclass(frozen=True)
class Sidecar:
    """Kind, source key and unbreakable spans of N documents."""

    kinds: np.ndarray  # uint8 [N]: index into KINDS
    key_offsets: np.ndarray  # int64 [N + 1] into key_bytes
    key_bytes: np.ndarray  # uint8: UTF-8 of all keys
    span_offsets: np.ndarray  # int64 [N + 1] into span_bounds
    span_bounds: np.ndarray  # int32 [M, 2]

    def __len__(self) -> int:
        return len(self.kinds)

    def key(self, document: int) -> str:
        return bytes(self.key_bytes[self.key_offsets[document] : self.key_offsets[document + 1]]).decode()

    @property
    def spans(self) -> Spans:
        return self.spans_of(np.arange(len(self)))

    def spans_of(self, documents: np.ndarray) -> Spans:
        """The spans of some documents, whose numbers ascend."""
        return Spans.select(self.span_offsets, self.span_bounds, documents)

    @property
    def digest(self) -> str:
        """Sha256 of kinds and spans; keys are left out, because they cannot be rebuilt from the ids."""
        digest = hashlib.sha256()
        for name in _DIGESTED:
            for part in _member([self], name):
                digest.update(part)
        return digest.hexdigest()

    @classmethod
    def read(cls, path: Path) -> "Sidecar":
        """Memory-mapped. Raises InputError: the file is no sidecar."""
        try:
            arrays = map_npz(path)
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, struct.error, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is damaged ({error}): remove it, it will be rebuilt") from None


_DIGESTED = ("kinds", "span_offsets", "span_bounds")


def write_sidecar(path: Path, parts: Sequence[Sidecar]) -> str:
    """Write the sidecar of the documents of all parts, one after the other; returns its digest.

    The file is what `np.savez` of the joined arrays gives, byte for byte, in memory that does not grow with them. No
    time is stamped into it: the same content, the same bytes.
    """
    digest = hashlib.sha256()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for field in fields(Sidecar):
            shape, dtype = _joined(parts, field.name)
            with archive.open(zipfile.ZipInfo(f"{field.name}.npy"), "w", force_zip64=True) as file:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for number, part in enumerate(_member(parts, field.name)):
                    if number:  # the first says shape and type, for the digest
                        file.write(part)
                    if field.name in _DIGESTED:
                        digest.update(part)
    return digest.hexdigest()


def _joined(parts: Sequence[Sidecar], name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of a field of all parts together."""
    rows = 0
    for part in parts:
        values = getattr(part, name)
        rows += len(values) - (1 if rows and name.endswith("_offsets") else 0)
    return (rows, *values.shape[1:]), values.dtype


def _member(parts: Sequence[Sidecar], name: str) -> Iterator[bytes]:
    """What the digest takes of a field of all parts together: type and shape, then the content in chunks."""
    shape, dtype = _joined(parts, name)
    yield f"{dtype.str}{shape}".encode()
    offset = 0
    if name.endswith("_offsets"):
        yield np.zeros(1, dtype).tobytes()
    for part in parts:
        values = getattr(part, name)
        first = 1 if name.endswith("_offsets") else 0
        for start in range(first, len(values), _CHUNK):
            yield np.ascontiguousarray(values[start : start + _CHUNK] + dtype.type(offset)).tobytes()
        offset += int(values[-1]) if first else 0


class SidecarBuilder:
    """Grows a sidecar, compactly."""

    def __init__(self) -> None:
        self.kinds = array.array("B")
        self.key_ends = array.array("q", [0])
        self.keys = bytearray()
        self.span_ends = array.array("q", [0])
        self.bounds = array.array("i")

    def add(self, kinds_D: np.ndarray, keys: Sequence[str], span_counts_D: np.ndarray, bounds_M2: np.ndarray) -> None:
        """Documents: kinds, keys, how many spans each has, and all spans."""
        self.kinds.frombytes(kinds_D.astype(np.uint8).tobytes())
        encoded = [key.encode() for key in keys]
        ends = len(self.keys) + np.cumsum([len(key) for key in encoded], dtype=np.int64)
        self.keys += b"".join(encoded)
        self.key_ends.frombytes(ends.tobytes())
        self.span_ends.frombytes((len(self.bounds) // 2 + np.cumsum(span_counts_D, dtype=np.int64)).tobytes())
        self.bounds.frombytes(bounds_M2.astype(np.int32).tobytes())

    def build(self) -> Sidecar:
        return Sidecar(
            kinds=np.frombuffer(self.kinds, dtype=np.uint8),
            key_offsets=np.frombuffer(self.key_ends, dtype=np.int64),
            key_bytes=np.frombuffer(self.keys, dtype=np.uint8),
            span_offsets=np.frombuffer(self.span_ends, dtype=np.int64),
            span_bounds=np.frombuffer(self.bounds, dtype=np.int32).reshape(-1, 2),
        )

"""Megatron's .idx, written and read in bounded memory.

    9 bytes MMIDIDX\\0\\0, uint64 version 1, uint8 code of the ids' type (4: int32), uint64 sequences,
    uint64 documents + 1, int32 lengths, int64 byte offsets, int64 first sequence of each document and one past the last

(megatron/core/datasets/indexed_dataset.py, _IndexWriter and _IndexReader; its builder holds Python lists of all of it.)
A document is one sequence here.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_ext.config import InputError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC, _VERSION, _INT32 = b"MMIDIDX\x00\x00", 1, 4
_CHUNK = 1 << 20  # documents at a time


def write_index(path: Path, lengths: Sequence[np.ndarray]) -> None:
    """Write the .idx of documents whose lengths in ids are the int32 arrays `lengths`, one after the other."""
    documents = sum(len(part) for part in lengths)
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, _VERSION, _INT32, documents, documents + 1))
        for part in _chunks(lengths):
            file.write(part.astype(np.int32).tobytes())
        end = 0
        for part in _chunks(lengths):
            ends = end + np.cumsum(part, dtype=np.int64) * np.dtype(np.int32).itemsize
            file.write(np.concatenate([[end], ends[:-1]]).astype(np.int64).tobytes())
            end = int(ends[-1])
        for first in range(0, documents + 1, _CHUNK):
            file.write(np.arange(first, min(first + _CHUNK, documents + 1), dtype=np.int64).tobytes())


def read_lengths(path: Path) -> np.ndarray:
    """int32 [N], memory-mapped: the lengths of the documents of an .idx.

    Raises:
        InputError: the file is no such index, or documents in it have several sequences.
    """
    try:
        with path.open("rb") as file:
            magic, version, code, sequences, documents = _HEADER.unpack(file.read(_HEADER.size))
    except (OSError, struct.error) as error:
        raise InputError(f"cannot read {path} ({error}): preprocess the data again") from None
    size = _HEADER.size + sequences * (4 + 8) + documents * 8
    if (magic, version, code) != (_MAGIC, _VERSION, _INT32) or path.stat().st_size != size:
        raise InputError(f"{path} is no index of int32 documents: preprocess the data again")
    if documents != sequences + 1:
        raise InputError(f"{path} has {sequences} sequences in {documents - 1} documents: one each is supported")
    if not sequences:
        return np.empty(0, np.int32)
    return np.memmap(path, np.int32, "r", _HEADER.size, (sequences,))


def _chunks(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for part in parts:
        for first in range(0, len(part), _CHUNK):
            yield part[first : first + _CHUNK]

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
_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
"""megatron-core's codes (indexed_dataset.py, DType)."""
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


def foreign_lengths(path: Path) -> np.ndarray:
    """As `read_lengths`, of an .idx that others wrote: also where each document begins is held against its length.

    Raises:
        InputError: it is not as `write_index` writes it; the message says in what, and how to write it.
    """
    try:
        with path.open("rb") as file:
            magic, version, code, sequences, documents = _HEADER.unpack(file.read(_HEADER.size))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: give the path of the .bin and .idx without suffix") from None
    except (OSError, struct.error) as error:
        raise InputError(f"cannot read {path} ({error}): copy or write it again") from None
    if (magic, version) != (_MAGIC, _VERSION):
        raise InputError(f"{path} does not begin as Megatron's .idx of version 1: give one that megatron-core wrote")
    if code != _INT32:
        raise InputError(
            f"{path} is of {_TYPES.get(code, f'unknown type {code}')} ids: write int32, as with "
            "IndexedDatasetBuilder(path, dtype=numpy.int32)"
        )
    if documents != sequences + 1:
        raise InputError(
            f"{path} has {sequences} sequences in {documents - 1} documents: write each document as one sequence, as "
            "with add_document(ids, [len(ids)])"
        )
    size, found = _HEADER.size + sequences * (4 + 8) + documents * 8, path.stat().st_size
    if found != size:
        raise InputError(
            f"{path} has {found} bytes, its {sequences} documents need {size}: it is cut or holds more than lengths "
            "(modes of a multimodal index): write it without"
        )
    lengths = read_lengths(path)
    if sequences:
        begins = np.memmap(path, np.int64, "r", _HEADER.size + sequences * 4, (sequences,))
        firsts = np.memmap(path, np.int64, "r", _HEADER.size + sequences * 12, (documents,))
        expected = np.cumsum(lengths, dtype=np.int64) * np.dtype(np.int32).itemsize
        if begins[0] or (begins[1:] != expected[:-1]).any() or (firsts != np.arange(documents)).any():
            raise InputError(
                f"{path} has documents that do not follow one another in the .bin: write it again in order"
            )
    return lengths


def _chunks(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for part in parts:
        for first in range(0, len(part), _CHUNK):
            yield part[first : first + _CHUNK]

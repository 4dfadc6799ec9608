"""Pictures and clips whose bytes stand in a column of a Parquet file, as in img2dataset's `parquet` output: a row is a
sample, and the column's name is its suffix (jpg, png, webp, mp4, ...)."""

import bisect
import functools
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.config import InputError
from megatron_ext.files import reading

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet


def media_column(schema: "pyarrow.Schema", suffixes: tuple[str, ...]) -> str | None:
    """The column of bytes that is named as one of `suffixes`; None where there is none."""
    from pyarrow import types

    is_bytes = (types.is_binary, types.is_large_binary, types.is_binary_view)
    columns = (column.name for column in schema if any(check(column.type) for check in is_bytes))
    return next((name for name in columns if name.lower() in suffixes), None)


def group_ends(file: "pyarrow.parquet.ParquetFile") -> list[int]:
    """Behind which row each row group ends."""
    metadata = file.metadata
    return list(itertools.accumulate(metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)))


def read_cell(path: Path, stamp: int, row: int, suffixes: tuple[str, ...]) -> bytes:
    """The bytes in row `row`, from 0, of a file with modification time `stamp`. Row groups are read as a whole and the
    last one is kept, so neighbours cost little.

    Raises:
        InputError: the file cannot be read, or has no such row.
    """
    with reading(path, "pictures of"):
        file, ends, column = _opened(path, stamp, suffixes)
        group = bisect.bisect_right(ends, row)
        if column is None or group == len(ends):
            raise InputError(f"{path} has no row {row} with a picture or clip")
        content = _group(path, stamp, column, group, file)[row - (ends[group - 1] if group else 0)].as_py()
        if content is None:
            raise InputError(f"row {row} of {path} is empty")
        return content


@functools.lru_cache(maxsize=1)
def _opened(
    path: Path, stamp: int, suffixes: tuple[str, ...]
) -> "tuple[pyarrow.parquet.ParquetFile, list[int], str | None]":
    import pyarrow.parquet  # here: only who reads Parquet needs it

    file = pyarrow.parquet.ParquetFile(path)
    return file, group_ends(file), media_column(file.schema_arrow, suffixes)


@functools.lru_cache(maxsize=1)
def _group(
    path: Path, stamp: int, column: str, number: int, file: "pyarrow.parquet.ParquetFile"
) -> "pyarrow.ChunkedArray":
    return file.read_row_group(number, columns=[column]).column(0)

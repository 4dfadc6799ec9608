"""Text corpora, document by document: plain text, JSON lines and Parquet; the first two also as .gz or .zst.

Only the document at hand is in memory, of Parquet a batch of rows.
"""

import gzip
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

from megatron_ext.config import InputError
from megatron_ext.files import files_named, parse_json, reading, suffix_of

if TYPE_CHECKING:
    import pyarrow

TextUnit = Literal["line", "paragraph", "file"]
"""What of a plain text file is one document; a paragraph ends at an empty line."""

NOT_UNICODE = "not UTF-8: it has a broken byte or a lone surrogate"

_JSON_LINES = ("jsonl", "ndjson", "json")  # C4 and Dolma name their files .json.gz
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class BadText:
    """A text that cannot be used."""

    place: str
    """File and first line, or row."""
    reason: str


def find_text_files(patterns: Iterable[str], *, option: str = "text") -> list[Path]:
    """The files that paths and patterns name, see `files.named`: each once, sorted.

    Raises:
        InputError: one of them names no file.
    """
    return sorted({file for pattern in patterns for file in files_named(pattern, option)})


def read_texts(
    path: Path, unit: TextUnit, on_read: Callable[[int], None], *, field: str = "text"
) -> Iterator[tuple[str, str] | BadText]:
    """(source key, text) of each document of a text file; the key is the path, `#` and a number from 1.

    Names decide, in letters of any case: .parquet has a document per row in column `field`; .jsonl (.ndjson, .json) one
    per line in key `field`; anything else is plain text, cut into documents by `unit`. A further .gz or .zst says how
    it is compressed.
    Blank texts are given too: the caller counts them. What is not UTF-8, or has no string where the text should be,
    comes as a BadText. `on_read` is told how many more of the file's bytes are done.

    Raises:
        InputError: the file cannot be read, or is damaged, or a Parquet file has no such column of strings.
    """
    with reading(path, "text"):
        is_parquet = suffix_of(path) == "parquet"
        documents = _parquet(path, field, on_read) if is_parquet else _lines_of(path, unit, field, on_read)
        for number, (place, text) in enumerate(documents, 1):
            if text is None:
                yield BadText(f"{path}:{place}", f"no string in field {field}")
            elif not is_unicode(text):
                yield BadText(f"{path}:{place}", NOT_UNICODE)
            else:
                yield f"{path.as_posix()}#{number}", text


def read_rows(
    path: Path, fields: Sequence[str], on_read: Callable[[int], None]
) -> Iterator[tuple[str, dict[str, Any]] | BadText]:
    """(source key, row) of each row of .jsonl (.ndjson, .json; also .gz or .zst) and .parquet; see `read_texts`.

    The key is the row's own `key`, else the path, `#` and a number from 1. What is no object, or holds a text that is
    not UTF-8, comes as a BadText. A Parquet file's other columns than `fields` are not read: they may be pictures.

    Raises:
        InputError: the file cannot be read, or is damaged, or has another suffix, or none of `fields` as a column.
    """
    if suffix_of(path) != "parquet" and _inner_suffix(path) not in _JSON_LINES:
        raise InputError(f"{path} has no rows: give .jsonl or .parquet")
    with reading(path, "text"):
        for number, (place, row) in enumerate(_rows(path, fields, on_read), 1):
            if not isinstance(row, dict):
                yield BadText(f"{path}:{place}", "no JSON object")
            elif not is_unicode(json.dumps(row, ensure_ascii=False, default=repr)):  # Parquet has times, bytes, ...
                yield BadText(f"{path}:{place}", NOT_UNICODE)
            else:
                yield str(row.get("key") or f"{path.as_posix()}#{number}"), row


def is_unicode(text: str) -> bool:
    """Whether a text can be written in UTF-8: a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Line(NamedTuple):
    number: int
    text: str


def _lines_of(
    path: Path, unit: TextUnit, field: str, on_read: Callable[[int], None]
) -> Iterator[tuple[int, str | None]]:
    """(first line, text) of each document of a text file or of JSON lines."""
    with _open_lines(path, on_read) as lines:
        if _inner_suffix(path) in _JSON_LINES:
            yield from ((line.number, _json_text(line.text, field)) for line in lines if line.text.strip())
        else:
            yield from _units(lines, unit)


def _inner_suffix(path: Path) -> str:
    """What the name says of the content, compressed or not."""
    suffix = suffix_of(path)
    return suffix_of(path.stem) if suffix in ("gz", "zst") else suffix


@contextmanager
def _open_lines(path: Path, on_read: Callable[[int], None]) -> Iterator[Iterator[_Line]]:
    with path.open("rb") as raw, closing(_decompressed(raw, suffix_of(path))) as file:
        try:
            yield _lines(file, raw, on_read)
        except OSError as error:
            if "requires too much memory" in str(error):  # zstd's own limit of what a file may ask for
                raise ValueError("its zstd window is above 128 MiB: compress it again with --long=27 or less") from None
            raise


def _rows(path: Path, fields: Sequence[str], on_read: Callable[[int], None]) -> Iterator[tuple[int, Any]]:
    """(line or row from 1, what it holds)."""
    if suffix_of(path) == "parquet":
        yield from enumerate(_parquet_rows(path, fields, on_read), 1)
        return
    with _open_lines(path, on_read) as lines:
        for line in lines:
            if line.text.strip():
                yield line.number, _json(line.text)


def _json(line: str) -> Any:
    """What a line of JSON holds; None where it is none."""
    try:
        return parse_json(line)
    except ValueError:
        return None


def _decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == "gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == "zst":
        import pyarrow  # here: only who reads .zst or .parquet needs it

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"))
    return raw


def _lines(file: BinaryIO, raw: BinaryIO, on_read: Callable[[int], None]) -> Iterator[_Line]:
    """The lines; bytes that are not UTF-8 become lone surrogates, so that the unit around them is found first."""
    done = 0
    for number, line in enumerate(file, 1):
        position = raw.tell()
        if position != done:
            on_read(position - done)
            done = position
        yield _Line(number, line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape"))


def _units(lines: Iterable[_Line], unit: TextUnit) -> Iterator[tuple[int, str]]:
    """(first line, text) of each unit."""
    if unit == "file":
        yield 1, "".join(line.text for line in lines)
    elif unit == "line":
        yield from ((line.number, line.text.rstrip("\r\n")) for line in lines if line.text.strip())
    else:
        for has_text, group in itertools.groupby(lines, key=lambda line: bool(line.text.strip())):
            if has_text:
                paragraph = list(group)
                yield paragraph[0].number, "".join(line.text for line in paragraph).rstrip("\r\n")


def _json_text(line: str, field: str) -> str | None:
    """A JSON object's string `field`; None where there is none."""
    row = _json(line)
    text = row.get(field) if isinstance(row, dict) else None
    return text if isinstance(text, str) else None


def _parquet(path: Path, field: str, on_read: Callable[[int], None]) -> Iterator[tuple[int, str | None]]:
    """(row from 1, text) of a Parquet file's column of strings."""
    for number, row in enumerate(_parquet_rows(path, [field], on_read, of_strings=True), 1):
        yield number, row[field]


def _parquet_rows(
    path: Path, fields: Sequence[str], on_read: Callable[[int], None], *, of_strings: bool = False
) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file: those of the columns `fields` that are there, and are strings where they must be."""
    import pyarrow
    import pyarrow.parquet

    size = path.stat().st_size
    with pyarrow.parquet.ParquetFile(path) as file:
        types = {column.name: column.type for column in file.schema_arrow}
        columns = [name for name in fields if name in types and (not of_strings or _is_of_strings(types[name]))]
        if not columns:
            wanted = " or ".join(map(repr, fields)) + (" of strings" if of_strings else "")
            found = ", ".join(f"{name} ({kind})" for name, kind in types.items())
            raise InputError(f"{path} has no column {wanted}; it has {found}")
        rows, first = file.metadata.num_rows, 0
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
            yield from batch.to_pylist()
            done = first + len(batch)
            on_read(size * done // rows - size * first // rows)
            first = done


def _is_of_strings(kind: "pyarrow.DataType") -> bool:
    """However they are stored: each string in its place, or once in a dictionary."""
    from pyarrow import types

    values = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(values) or types.is_large_string(values) or types.is_string_view(values)

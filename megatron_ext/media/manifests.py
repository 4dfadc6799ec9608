"""Tables that name one picture or clip per row: JSON lines or Parquet, as curation and captioning write them.

| column | |
|---|---|
| `path` | the file, or the tar that holds it; relative to the manifest's folder, or else to the current one |
| `key` | what the sample is called; without it the path up to the first dot of its last part |
| `caption`, `captions` (a list), `caption_*` | captions; without any, those of KEY.txt and KEY.json beside a file |
| `offset`, `size` | the bytes of the sample inside a tar; of a Parquet file's row `offset`, from 0 |
| `kind` | image or video; without it the suffix of `source`, or else of `path`, says it |
| `source` | where the sample is, for people; without it `path`, and `offset` where there is one |
| `verdict` | curation's: rows that are not `kept` are left out |

Other columns are passed over. Rows stay in their order. A Parquet file without `path` may hold pictures or clips
itself, as img2dataset's `parquet` output does: their bytes in a column named jpg, png, webp, mp4, ...; rows without
bytes, which could not be downloaded, are left out.
"""

import bisect
import functools
import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.config import InputError
from megatron_ext.files import parse_json, reading, suffix_of
from megatron_ext.media.cells import group_ends, media_column
from megatron_ext.media.groups import caption_suffixes
from megatron_ext.media.samples import KINDS, Extent, Fault, Sample, captions_in, readable_name

if TYPE_CHECKING:
    import pyarrow

MANIFESTS = ("jsonl", "ndjson", "parquet")
"""Suffixes of manifests."""

KEPT = "kept"
"""The verdict of what curation keeps."""

_COLUMNS = ("path", "key", "captions", "offset", "size", "kind", "source", "verdict")


def open_manifest(path: Path) -> "JsonManifest | ParquetManifest":
    """Raises InputError: it cannot be read, or is a Parquet file without a column `path` or one of pictures."""
    with reading(path, "manifest"):
        return ParquetManifest(path) if suffix_of(path) == "parquet" else JsonManifest(path)


class JsonManifest:
    """One JSON object per line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts = array("q", [0])
        with path.open("rb") as file:
            for line in file:
                self._starts.append(self._starts[-1] + len(line))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def entries(self, first: int, stop: int) -> list[Sample | Fault]:
        """What rows `first` to `stop` - 1 name."""
        with reading(self._path, "manifest"), self._path.open("rb") as file:
            file.seek(self._starts[first])
            lines = [file.readline() for _ in range(first, min(stop, len(self)))]
        found = (
            _entry(self._path, number, _object(line)) for number, line in enumerate(lines, first + 1) if line.strip()
        )
        return [entry for entry in found if entry is not None]


class ParquetManifest:
    """One row per sample; a row group is in memory at a time."""

    def __init__(self, path: Path) -> None:
        import pyarrow  # here: only who reads Parquet needs it
        import pyarrow.parquet

        self._path = path
        self._file = pyarrow.parquet.ParquetFile(path)
        names = self._file.schema_arrow.names
        self._media = None if "path" in names else media_column(self._file.schema_arrow, tuple(KINDS))
        if "path" not in names and self._media is None:
            raise InputError(
                f"manifest {path} has no column path, and none of bytes named {', '.join(KINDS)}; "
                f"it has {', '.join(names)}"
            )
        self._columns = [
            name for name in names if name in _COLUMNS or name.startswith("caption") or name == self._media
        ]
        self._stamp = os.stat(path).st_mtime_ns
        self._ends = group_ends(self._file)
        self._held: tuple[int, pyarrow.Table] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def entries(self, first: int, stop: int) -> list[Sample | Fault]:
        """What rows `first` to `stop` - 1 name."""
        found = []
        stop = min(stop, len(self))
        number = bisect.bisect_right(self._ends, first)  # of the first group that ends after row `first`
        while first < stop:
            start, end = self._ends[number - 1] if number else 0, min(stop, self._ends[number])
            rows = self._group(number).slice(first - start, end - first).to_pylist()
            found += (self._entry(row, fields) for row, fields in enumerate(rows, first + 1))
            first = end
            number += 1
        return [entry for entry in found if entry is not None]

    def _entry(self, row: int, fields: Mapping[str, Any]) -> Sample | Fault | None:
        if self._media is None:
            return _entry(self._path, row, fields)
        size, key = fields[self._media], fields.get("key")
        if size is None or (fields.get("verdict") or KEPT) != KEPT:
            return None
        return Sample(
            key=_printable(str(key)) if key else f"{readable_name(self._path.stem)}-{row}",
            kind=KINDS[self._media.lower()],
            source=f"{readable_name(str(self._path))}#{row}",
            media=Extent(path=self._path, offset=row - 1, size=size, stamp=self._stamp),
            text=None,
            fields=None,
            given=tuple(map(_printable, captions_in(fields))),
        )

    def _group(self, number: int) -> "pyarrow.Table":
        """A row group, with the sizes of pictures in place of their bytes."""
        import pyarrow.compute

        if self._held is None or self._held[0] != number:
            with reading(self._path, "manifest"):
                group = self._file.read_row_group(number, columns=self._columns)
            if self._media is not None:
                sizes = pyarrow.compute.binary_length(group.column(self._media))
                group = group.set_column(group.column_names.index(self._media), self._media, sizes)
            self._held = (number, group)
        return self._held[1]


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        fields = parse_json(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def _entry(manifest: Path, row: int, fields: Mapping[str, Any] | None) -> Sample | Fault | None:
    """What a row names; None where curation dropped it."""
    place = _printable(f"{manifest}#{row}")
    if fields is None:
        return Fault(key=place, source=place, reason="the row is no JSON object in UTF-8")
    if (fields.get("verdict") or KEPT) != KEPT:
        return None
    name = fields.get("path")
    if not isinstance(name, str) or not name:
        return Fault(key=place, source=place, reason="the row has no string in column path")
    key = fields.get("key")
    key = key if isinstance(key, str) and key else _key_of(name)
    source = _source(name, fields)
    kind = fields.get("kind") or _kind_of(source) or _kind_of(name)
    key = _printable(key)
    if kind not in ("image", "video"):
        reason = f"neither column kind nor the suffix says whether it is a picture or a clip ({place})"
        return Fault(key=key, source=source, reason=reason)
    captions = tuple(map(_printable, captions_in(fields)))
    try:
        media, beside = _extents(_find(manifest.parent, name), fields, bool(captions))
    except (OSError, TypeError, ValueError) as error:  # ValueError: also a NUL or half a surrogate pair in a path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return Fault(key=key, source=source, reason=f"cannot be read ({reason}; {place})")
    return Sample(key=key, kind=kind, source=source, media=media, **beside, given=captions)


def _source(name: str, fields: Mapping[str, Any]) -> str:
    """Thousands of rows name one tar: there the offset tells them apart."""
    given, offset = fields.get("source"), fields.get("offset")
    if isinstance(given, str) and given:
        return _printable(given)
    return _printable(name if offset is None else f"{name}:{offset}")


def _kind_of(name: str) -> str | None:
    return KINDS.get(suffix_of(name))


def _extents(path: Path, fields: Mapping[str, Any], has_captions: bool) -> tuple[Extent, dict[str, Extent | None]]:
    """The bytes of a row's picture or clip, and of the captions beside it where the row has none."""
    beside: dict[str, Extent | None] = {"text": None, "fields": None}
    offset, size = fields.get("offset"), fields.get("size")
    if offset is not None and size is not None:
        if int(offset) < 0 or int(size) < 0:
            raise ValueError(f"offset {offset}, size {size}")
        return Extent(path=path, offset=int(offset), size=int(size), stamp=_stamp(path)), beside
    if not has_captions:
        stem, _, suffix = path.name.partition(".")
        for field, suffixes in caption_suffixes(suffix.lower()).items():
            files = (path.with_name(f"{stem}.{each}") for each in suffixes)
            beside[field] = next((_whole(file) for file in files if file.is_file()), None)
    return _whole(path), beside


def _printable(text: str) -> str:
    """JSON can spell half a surrogate pair, which no file can hold."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _key_of(name: str) -> str:
    folder, _, last = name.rpartition("/")
    stem = last.partition(".")[0]
    return f"{folder}/{stem}".lstrip("./") if folder else stem


def _find(folder: Path, name: str) -> Path:
    beside = folder / name
    return beside if beside.exists() else Path(name)


def _whole(path: Path) -> Extent:
    status = path.stat()
    return Extent(path=path, offset=0, size=status.st_size, stamp=status.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _stamp(path: Path) -> int:
    """Thousands of rows name one tar."""
    return os.stat(path).st_mtime_ns

"""An index of pictures and clips: where each one's bytes are and what its header says, kept in columns.

Headers are read once. With a folder for the index, what was read of an input stays there: a tar is looked at again only
when its size or modification time changes, of a folder only the files whose did.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.media.errors import MediaError
from megatron_ext.media.headers import Header, read_header
from megatron_ext.media.listing import Layout, Part, expand, layout_of, listing_of
from megatron_ext.media.members import key_of
from megatron_ext.media.samples import Extent, Fault, Sample, readable_name
from megatron_ext.media.table import MediaTable

READERS = 8
"""Threads that read headers: on a network file system they wait more than they work."""

SHAPING_COLUMNS = ("is_clip", "size", "height", "width", "num_frames", "frame_rate")
"""What of a sample beside its name counts for the digest of an index."""

_AT_ONCE = 1024

Progress = Callable[[str, int, str], contextlib.AbstractContextManager[Callable[[int], None]]]
"""(label, total, unit) -> a context whose value is called with the number of items just done."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """An input as it was found."""

    number: int
    """Which of the configured inputs it is from."""

    path: Path
    layout: Layout

    length: int
    """Number of its samples."""


class MediaIndex:
    """The samples of several inputs one after the other: sample i is row i of the tables end to end."""

    def __init__(self, parts: Sequence[tuple[int, Path, MediaTable]]) -> None:
        """`parts` are (number of the input as configured, its path, its table)."""
        self._sources = [
            Source(number=number, path=path, layout=layout_of(path), length=len(table)) for number, path, table in parts
        ]
        lengths = [source.length for source in self._sources]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._table = table = MediaTable.joined([table for _, _, table in parts])
        self.input_number = np.repeat(np.array([source.number for source in self._sources], np.int32), lengths)
        """Which of the configured inputs each sample is from."""
        self.is_clip, self.height, self.width = table.is_clip, table.height, table.width
        self.num_frames, self.frame_rate = table.num_frames, table.frame_rate
        self.digest = self._digest()
        """Names what there is to see and in which order: names inside the inputs, bytes, shapes, frames, unreadable
        headers. Where the inputs lie and when their files were written does not count."""

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> Sample:
        """Sample `number`, without its captions."""
        row = range(len(self))[number]
        source = self._sources[int(np.searchsorted(self._starts, row, side="right")) - 1]
        path, name, table = source.path, self._table.names[row], self._table
        file = path / name if source.layout == "folder" else path
        extent = Extent(
            path=file, offset=int(table.offset[row]), size=int(table.size[row]), stamp=int(table.stamp[row])
        )
        return Sample(
            key=readable_name(key_of(path.name if source.layout == "media" else name)),
            kind="video" if table.is_clip[row] else "image",
            source=f"{path}:{name}" if source.layout == "tar" else str(file),
            media=extent,
            text=None,
            fields=None,
        )

    def codec(self, number: int) -> str:
        """How sample `number` is encoded, as in `Header`."""
        return self._table.codecs[self._table.codec[number]]

    def faults(self) -> Iterator[tuple[int, str]]:
        """(sample, why it cannot be used) of those of which listing or the header says so."""
        return iter(self._table.faults.items())

    def _digest(self) -> str:
        found = hashlib.sha256()
        for source in self._sources:
            name = "" if source.layout == "folder" else source.path.name
            found.update(f"{source.number} {source.length} {name}\0".encode("utf-8", "surrogateescape"))
        names, table = self._table.names, self._table
        found.update(names.content.data)
        for column in (names.ends, *(getattr(table, name) for name in SHAPING_COLUMNS)):
            found.update(column.data)
        return found.hexdigest()[:24]


def build_index(inputs: Sequence[str], index_dir: str | None, progress: Progress) -> MediaIndex:
    """The samples of all inputs (paths or patterns). Interrupted, it keeps the inputs that were finished.

    What listing finds unusable (a second picture of one key, the end of a damaged tar) is a row of faults.

    Raises:
        InputError: as `expand` and `listing_of`; nothing usable; a manifest; `index_dir` cannot be written.
    """
    paths = [(number, path) for number, pattern in enumerate(inputs) for path in expand(pattern)]
    for manifest in (path for _, path in paths if layout_of(path) == "manifest"):
        raise InputError(
            f"input {str(manifest)!r} is a manifest, and an index has folders and tars alone: for curated pictures "
            "give the tars that curate_images.py --kept tars writes (OUTPUT/kept/*.tar), for clips OUTPUT/clips/*.tar"
        )
    caches = {
        path: Path(index_dir) / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:24]}.npz"
        for _, path in paths
        if index_dir is not None and layout_of(path) != "media"  # a file for each picture is too many
    }
    tables: list[MediaTable | None] = []
    listed: dict[int, tuple[list[Sample | Fault], MediaTable | None]] = {}
    with progress("list media", len(paths), "inputs") as advance:
        for place, (_, path) in enumerate(paths):
            kept = MediaTable.load(caches[path]) if path in caches else None
            is_folder = layout_of(path) == "folder"
            known = kept[0] if kept and (is_folder or kept[1] == _stamp(path)) else None
            tables.append(None if is_folder else known)
            if tables[place] is None:
                listing = listing_of(Part(layout=layout_of(path), paths=(path,)))
                listed[place] = (listing.entries(0, len(listing)), known)
            advance(1)
    entries = [entry for found, _ in listed.values() for entry in found]
    if not any(tables) and all(isinstance(entry, Fault) for entry in entries):
        path, fault = paths[0][1], entries[0]
        raise InputError(f"input {readable_name(str(path))!r}: {fault.source}: {fault.reason}")
    with progress("read headers", len(entries), "samples") as advance, ThreadPoolExecutor(READERS) as pool:
        for place, (found, known) in listed.items():
            path = paths[place][1]
            stamp = _stamp(path)
            tables[place] = table = _table(path, found, known, pool, advance)
            if path in caches:
                table.save(caches[path], stamp)
    return MediaIndex([(number, path, table) for (number, path), table in zip(paths, tables, strict=True)])


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _table(
    path: Path,
    entries: list[Sample | Fault],
    known: MediaTable | None,
    pool: ThreadPoolExecutor,
    advance: Callable[[int], None],
) -> MediaTable:
    """The table of `entries`, of the samples that changed since `known` with their headers read."""
    samples = [_without_bytes(entry) if isinstance(entry, Fault) else entry for entry in entries]
    names = [_name(path, sample) for sample in samples]
    rows = {name: row for row, name in enumerate(known.names)} if known else {}

    def look_up(number: int) -> Header | str:
        if isinstance(entry := entries[number], Fault):
            return entry.reason
        media, row = samples[number].media, rows.get(names[number])
        if known and row is not None and (known.size[row], known.stamp[row]) == (media.size, media.stamp):
            return known.faults.get(row) or known.header(row)
        try:
            return read_header(samples[number])
        except MediaError as error:
            return str(error)

    found: list[Header | str] = []
    for first in range(0, len(samples), _AT_ONCE):  # a pool's map takes in all its items at once
        found += pool.map(look_up, range(first, min(first + _AT_ONCE, len(samples))))
        advance(len(found) - first)
    return MediaTable.of(names, samples, found)


def _without_bytes(fault: Fault) -> Sample:
    """The row that tells of a fault."""
    nothing = Extent(path=Path(fault.source), offset=0, size=0, stamp=0)
    return Sample(key=fault.key, kind="image", source=fault.source, media=nothing, text=None, fields=None)


def _name(path: Path, sample: Sample) -> str:
    """Where the media of `sample` is inside the input at `path`."""
    if layout_of(path) == "tar":
        return sample.source.removeprefix(f"{path}:")
    return sample.media.path.relative_to(path).as_posix()  # of a picture, nothing: "."

"""An index of pictures and clips: where each one's bytes are and what its header says, kept in columns.

Headers are read once. With a folder for the index, what was read of an input stays there: a tar is looked at again only
when its size or modification time changes, of a folder only the files whose did.
"""

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.files import replacing, writing
from megatron_ext.media.errors import MediaError
from megatron_ext.media.headers import Header, read_header
from megatron_ext.media.listing import expand, layout_of, samples_of
from megatron_ext.media.samples import Extent, Sample

FORMAT = 1
"""Number of the layout of the index files; others are made anew."""

READERS = 8
"""Threads that read headers: on a network file system they wait more than they work."""

_AT_ONCE = 1024

Progress = Callable[[str, int, str], contextlib.AbstractContextManager[Callable[[int], None]]]
"""(label, total, unit) -> a context whose value is called with the number of items just done."""


@dataclass(frozen=True, kw_only=True)
class MediaTable:
    """The samples of one input, a column for each property; row i of every column is sample i."""

    names: list[str]
    """Path of the media file inside the input."""

    keys: list[str]
    """As in `Sample`."""

    is_clip: np.ndarray
    """Bool."""

    offset: np.ndarray
    """First byte inside the file."""

    size: np.ndarray
    """Number of bytes."""

    stamp: np.ndarray
    """Modification time of the file in nanoseconds."""

    height: np.ndarray
    """Pixels, upright; 0 where the header is unreadable."""

    width: np.ndarray
    """Pixels, upright."""

    num_frames: np.ndarray
    """Frames of a clip."""

    frame_rate: np.ndarray
    """Frames per second of a clip."""

    codec: list[str]
    """As in `Header`."""

    fault: list[str]
    """Why the header is unreadable; empty where it is not."""

    def save(self, path: Path, stamp: list[int]) -> None:
        """Write the table under `path`; `stamp` is what must still hold of the input for the table to hold."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays = {name: column for name, column in columns.items() if isinstance(column, np.ndarray)}
        texts = {name: column for name, column in columns.items() if not isinstance(column, np.ndarray)}
        header = json.dumps({"format": FORMAT, "stamp": stamp, "texts": texts}).encode("ascii")
        with writing(path, "media.index_dir"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, is_shared=True) as temporary, temporary.open("wb") as file:
                np.savez(file, header=np.frombuffer(header, dtype=np.uint8), **arrays)

    @classmethod
    def load(cls, path: Path) -> tuple["MediaTable", list[int]] | None:
        """The table under `path` and its stamp; None where there is none that can be read."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                header = json.loads(arrays["header"].tobytes())
                if header["format"] != FORMAT:
                    return None
                columns = {name: arrays[name] for name in arrays.files if name != "header"}
            return cls(**columns, **header["texts"]), header["stamp"]
        except (OSError, EOFError, zipfile.BadZipFile, ValueError, KeyError, TypeError):
            return None  # a cache: what cannot be read is made anew


class MediaIndex:
    """The samples of several inputs one after the other: sample i is row i of the tables end to end."""

    def __init__(self, parts: Sequence[tuple[int, Path, MediaTable]]) -> None:
        """`parts` are (number of the input as configured, its path, its table)."""
        self._parts = [(path, layout_of(path), table) for _, path, table in parts]
        lengths = [len(table.names) for _, _, table in self._parts]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.input_number = np.repeat([number for number, _, _ in parts], lengths)
        """Which of the configured inputs each sample is from."""
        self.is_clip, self.height, self.width, self.num_frames, self.frame_rate = (
            np.concatenate([getattr(table, name) for _, _, table in self._parts])
            for name in ("is_clip", "height", "width", "num_frames", "frame_rate")
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Sample:
        """Sample `number`, without its captions."""
        part, row = self._find(number)
        path, layout, table = self._parts[part]
        name = table.names[row]
        file = path / name if layout == "folder" else path
        extent = Extent(
            path=file, offset=int(table.offset[row]), size=int(table.size[row]), stamp=int(table.stamp[row])
        )
        return Sample(
            key=table.keys[row],
            kind="video" if table.is_clip[row] else "image",
            source=f"{path}:{name}" if layout == "tar" else str(file),
            media=extent,
            text=None,
            fields=None,
        )

    def codec(self, number: int) -> str:
        """How sample `number` is encoded, as in `Header`."""
        part, row = self._find(number)
        return self._parts[part][2].codec[row]

    def faults(self) -> Iterator[tuple[int, str]]:
        """(sample, why its header is unreadable) of those that are."""
        for start, (_, _, table) in zip(self._starts, self._parts, strict=False):
            for row in np.flatnonzero(table.height == 0):
                yield int(start + row), table.fault[row]

    def _find(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} is outside [0, {len(self)})")
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        return part, int(number - self._starts[part])


def build_index(inputs: Sequence[str], index_dir: str | None, progress: Progress) -> MediaIndex:
    """The samples of all inputs (paths or patterns). Interrupted, it keeps the inputs that were finished.

    Raises:
        InputError: as `expand` and `samples_of`; a manifest; `index_dir` cannot be written.
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
    listed: dict[int, tuple[list[Sample], MediaTable | None]] = {}
    with progress("list media", len(paths), "inputs") as advance:
        for place, (_, path) in enumerate(paths):
            kept = MediaTable.load(caches[path]) if path in caches else None
            is_folder = layout_of(path) == "folder"
            known = kept[0] if kept and (is_folder or kept[1] == _stamp(path)) else None
            tables.append(None if is_folder else known)
            if tables[place] is None:
                listed[place] = (samples_of(path), known)
            advance(1)
    total = sum(len(samples) for samples, _ in listed.values())
    with progress("read headers", total, "samples") as advance, ThreadPoolExecutor(READERS) as pool:
        for place, (samples, known) in listed.items():
            path = paths[place][1]
            stamp = _stamp(path)
            tables[place] = table = _table(path, samples, known, pool, advance)
            if path in caches:
                table.save(caches[path], stamp)
    return MediaIndex([(number, path, table) for (number, path), table in zip(paths, tables, strict=True)])


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _table(
    path: Path,
    samples: list[Sample],
    known: MediaTable | None,
    pool: ThreadPoolExecutor,
    advance: Callable[[int], None],
) -> MediaTable:
    """The table of `samples`, of those that changed since `known` with their headers read."""
    names = [_name(path, sample) for sample in samples]
    rows = {name: row for row, name in enumerate(known.names)} if known else {}

    def look_up(number: int) -> Header | str:
        media, row = samples[number].media, rows.get(names[number])
        if known and row is not None and (known.size[row], known.stamp[row]) == (media.size, media.stamp):
            return known.fault[row] or Header(
                height=int(known.height[row]),
                width=int(known.width[row]),
                num_frames=int(known.num_frames[row]),
                frame_rate=float(known.frame_rate[row]),
                codec=known.codec[row],
            )
        try:
            return read_header(samples[number])
        except MediaError as error:
            return str(error)

    found: list[Header | str] = []
    for first in range(0, len(samples), _AT_ONCE):  # a pool's map takes in all its items at once
        found += pool.map(look_up, range(first, min(first + _AT_ONCE, len(samples))))
        advance(len(found) - first)
    headers = [item if isinstance(item, Header) else Header(height=0, width=0, codec="") for item in found]
    return MediaTable(
        names=names,
        keys=[sample.key for sample in samples],
        is_clip=np.array([sample.kind == "video" for sample in samples]),
        offset=np.array([sample.media.offset for sample in samples], dtype=np.int64),
        size=np.array([sample.media.size for sample in samples], dtype=np.int64),
        stamp=np.array([sample.media.stamp for sample in samples], dtype=np.int64),
        height=np.array([header.height for header in headers], dtype=np.int32),
        width=np.array([header.width for header in headers], dtype=np.int32),
        num_frames=np.array([header.num_frames for header in headers], dtype=np.int32),
        frame_rate=np.array([header.frame_rate for header in headers], dtype=np.float64),
        codec=[header.codec for header in headers],
        fault=["" if isinstance(item, Header) else item for item in found],
    )


def _name(path: Path, sample: Sample) -> str:
    """Where the media of `sample` is inside the input at `path`."""
    if layout_of(path) == "tar":
        return sample.source.removeprefix(f"{path}:")
    return sample.media.path.relative_to(path).as_posix()  # of a picture, nothing: "."

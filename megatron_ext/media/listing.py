"""What there is to read: pictures and clips with captions, from folders, tar files and manifests.

A folder is img2dataset's "files" output: KEY.jpg (or another picture or clip), KEY.txt with the caption, KEY.json with
more about it; sub-folders are searched, and the tars in them are read. A tar is a WebDataset shard. A manifest (module
manifests) names one sample per row. Module groups says which files make a sample.

Inputs are paths or glob patterns. Listing reads names only (of a tar, its headers); the bytes are read sample by
sample, in any order.
"""

import itertools
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from megatron_ext.config import InputError
from megatron_ext.files import named, suffix_of, walk
from megatron_ext.media.groups import Entry, caption_suffixes, grouped, matters
from megatron_ext.media.manifests import MANIFESTS, open_manifest
from megatron_ext.media.samples import KINDS, Extent, Fault, Sample, readable_name
from megatron_ext.media.tars import is_tar_name, tar_samples

Layout = Literal["folder", "tar", "media", "manifest"]
"""What an existing input is: a folder of samples, a tar, one picture or clip, or a table of samples."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Inputs that are listed together: one folder, tar or manifest, or pictures and clips named one by one."""

    layout: Layout
    paths: tuple[Path, ...]

    def __str__(self) -> str:
        return readable_name(str(self.paths[0]) + (", ..." if len(self.paths) > 1 else ""))


def parts_of(inputs: Iterable[str | Path], *, option: str = "input") -> list[Part]:
    """The inputs, patterns expanded, in the order given; what is named twice counts once. No file is opened.

    Raises:
        InputError: as `expand`.
    """
    paths = dict.fromkeys(path for pattern in inputs for path in expand(pattern, option=option))
    parts: list[Part] = []
    for layout, group in itertools.groupby(paths, key=layout_of):
        if layout == "media":
            parts.append(Part(layout=layout, paths=tuple(group)))
        else:
            parts += (Part(layout=layout, paths=(path,)) for path in group)
    return parts


class Listing(Protocol):
    """What a part holds: samples and, in their places, what cannot be used of it."""

    def __len__(self) -> int:
        """Number of places."""

    def entries(self, first: int, stop: int) -> list[Sample | Fault]:
        """Those of the places from `first` to `stop` - 1; rows of a manifest that curation dropped are left out."""


class _Listed:
    def __init__(self, entries: list[Sample | Fault]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self, first: int, stop: int) -> list[Sample | Fault]:
        return self._entries[first:stop]


def listing_of(part: Part) -> Listing:
    """Look at a part. Folders and tars are listed by key; the rows of a manifest are read where they are asked for.

    Raises:
        InputError: a folder without media; a manifest that cannot be read.
    """
    return open_manifest(part.paths[0]) if part.layout == "manifest" else _Listed(_entries(part))


def _entries(part: Part) -> list[Sample | Fault]:
    if part.layout == "tar":
        return tar_samples(part.paths[0])
    if part.layout == "media":
        return [entry for path in part.paths for entry in _beside(path)]
    found = grouped(_folder_entries(part.paths[0]), in_tar=False)
    if not found:
        raise InputError(f"input {str(part)!r} holds no picture, no clip and no tar ({', '.join(KINDS)})")
    return found


def list_samples(inputs: Iterable[str | Path]) -> list[Sample]:
    """All samples of the inputs, in the order given, within each by key.

    Raises:
        InputError: as `expand` and `samples_of`; a key twice.
    """
    samples: dict[str, Sample] = {}
    for path in (path for pattern in inputs for path in expand(pattern)):
        for sample in samples_of(path):
            if sample.key in samples:
                raise InputError(
                    f"key {sample.key!r} is in {samples[sample.key].source} and in {sample.source}: keys must be unique"
                )
            samples[sample.key] = sample
    return list(samples.values())


def samples_of(path: Path) -> list[Sample]:
    """The samples of one input, all of which must be usable as far as listing sees.

    Raises:
        InputError: as `listing_of`, and for its first fault.
    """
    listing = listing_of(Part(layout=layout_of(path), paths=(path,)))
    entries = listing.entries(0, len(listing))
    for fault in (entry for entry in entries if isinstance(entry, Fault)):
        raise InputError(f"input {readable_name(str(path))!r}: {fault.source}: {fault.reason}")
    return entries


def expand(pattern: str | Path, *, option: str = "input") -> list[Path]:
    """The folders, tars, media files and manifests that an input names, see `files.named`; of a folder also the tars
    in it, behind it where it holds something else as well.

    A pattern's matches that are nothing of this, such as img2dataset's `00000_stats.json`, are passed over; so are
    manifests, unless its end names them (`*.parquet`): img2dataset's tars have others beside them.

    Raises:
        InputError: as `files.named`, or nothing that could hold media matches.
    """
    found = named(pattern, option)
    if not os.path.exists(pattern):
        end = suffix_of(pattern)
        suffixes = (*KINDS, *((end,) if end in MANIFESTS else ()))
        found = [p for p in found if p.is_dir() or suffix_of(p) in suffixes or is_tar_name(p.name)]
    if not found:
        raise InputError(f"{option} {str(pattern)!r} matches no folder, no tar and no media file: correct the pattern")
    for path in (p for p in found if not p.exists() and suffix_of(p) not in KINDS):
        raise InputError(f"{option} {str(pattern)!r}: {path} is a link that leads nowhere: mend or remove it")
    return [path for match in found for path in (_folder_and_tars(match) if match.is_dir() else [match])]


def layout_of(path: Path) -> Layout:
    """What an existing input is."""
    if path.is_dir():
        return "folder"
    suffix = suffix_of(path)
    return "media" if suffix in KINDS else "manifest" if suffix in MANIFESTS else "tar"


def _folder_and_tars(folder: Path) -> list[Path]:
    """The folder, unless it holds tars and nothing else that `_folder_entries` would name, and its tars."""
    tars: list[Path] = []
    unreadable: list[Path] = []
    has_others = False
    for place, files in walk(folder, lambda place, error: unreadable.append(place)):
        for file in (each for each in files if not each.name.startswith(".")):
            if _is_lost(file) or suffix_of(file.name) in KINDS:
                has_others = True
            elif is_tar_name(file.name):
                tars.append(place / file.name)
    return [*([folder] if has_others or unreadable or not tars else []), *sorted(tars)]


def _is_lost(file: os.DirEntry) -> bool:
    """Whether it is a link that leads nowhere."""
    return file.is_symlink() and not os.path.exists(file)


def _folder_entries(folder: Path) -> list[Entry]:
    """The files of a folder and of those below, by name, tars left out; and what keeps others from being found."""
    found: list[Entry] = []

    def note(place: Path, error: OSError) -> None:
        if place == folder:
            raise InputError(f"input {str(folder)!r} cannot be searched ({error.strerror}): check its permissions")
        name = f"{place.relative_to(folder).as_posix()}/"
        found.append(Entry(name, str(place), f"the folder cannot be searched ({error.strerror})"))

    for place, files in walk(folder, note):
        for file in files:
            if matters(file.name) or _is_lost(file):
                found.append(_entry(folder, place / file.name))
    return sorted(found, key=lambda entry: entry.name)


def _entry(folder: Path, path: Path) -> Entry:
    name = path.relative_to(folder).as_posix()
    try:
        status = path.stat()
    except OSError as error:
        what = "a link that leads nowhere" if path.is_symlink() else "it cannot be read"
        return Entry(name, str(path), f"{what} ({error.strerror})")
    if not stat.S_ISREG(status.st_mode):
        return Entry(name, str(path), "it is no file")
    return Entry(name, str(path), Extent(path=path, offset=0, size=status.st_size, stamp=status.st_mtime_ns))


def _beside(path: Path) -> list[Sample | Fault]:
    """The sample that a picture or clip is with what lies beside it."""
    key, _, suffix = path.name.partition(".")
    names = (f"{key}.{name}" for names in caption_suffixes(suffix.lower()).values() for name in names)
    others = [other for name in names if (other := path.with_name(name)).exists()]
    return grouped([_entry(path.parent, each) for each in (path, *others)], in_tar=False)

"""What there is to read: pictures and clips with captions, from folders, tar files and manifests.

A folder is img2dataset's "files" output: KEY.jpg (or another picture or clip), KEY.txt with the caption, KEY.json with
more about it; sub-folders are searched. A tar is a WebDataset shard: members of one key stand together.
A key is the path without everything from the first dot of its last part (module members). A manifest (module
manifests) names one sample per row.

Inputs are paths or glob patterns. Listing reads names only (of a tar, its headers); the bytes are read sample by
sample, in any order.
"""

import glob
import itertools
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from megatron_ext.config import InputError
from megatron_ext.media.manifests import MANIFESTS, open_manifest
from megatron_ext.media.members import key_of
from megatron_ext.media.samples import KINDS, Extent, Fault, Sample, readable_name

# KEY.mask.png beside KEY.jpg is something else about the sample; alone it is a picture whose name has a dot.
OTHER_MEDIA = "other media"

Layout = Literal["folder", "tar", "media", "manifest"]
"""What an existing input is: a folder of samples, a tar, one picture or clip, or a table of samples."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Inputs that are listed together: one folder, tar or manifest, or pictures and clips named one by one."""

    layout: Layout
    paths: tuple[Path, ...]

    def __str__(self) -> str:
        return readable_name(str(self.paths[0]) + (", ..." if len(self.paths) > 1 else ""))


def parts_of(inputs: Iterable[str | Path]) -> list[Part]:
    """The inputs, patterns expanded, in the order given; what is named twice counts once. Nothing is opened.

    Raises:
        InputError: as `expand`.
    """
    paths = dict.fromkeys(path for pattern in inputs for path in expand(pattern))
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
        return _tar_samples(part.paths[0])
    if part.layout == "media":
        return [entry for path in part.paths for entry in _beside(path)]
    found = _grouped(_folder_entries(part.paths[0], part.paths[0].rglob("*")))
    if not found:
        raise InputError(f"input {str(part)!r} holds no picture and no clip ({', '.join(KINDS)})")
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


def expand(pattern: str | Path) -> list[Path]:
    """What an input names: the path itself, or what a glob pattern (`*`, `?`, `[...]`, `**`) matches, sorted.

    A pattern's matches that are neither folders, tars nor media files, such as img2dataset's `00000_stats.json`, are
    passed over; so are manifests, unless its end names them (`*.parquet`): img2dataset's tars have others beside them.

    Raises:
        InputError: there is no such path, or nothing that could hold media matches.
    """
    path = Path(pattern)
    if path.exists():
        return [path]
    if not glob.has_magic(str(pattern)):
        raise InputError(
            f"input {str(pattern)!r} is missing: give a folder of media files, a WebDataset tar or a manifest"
        )
    matches = map(Path, sorted(glob.glob(str(pattern), recursive=True)))
    end = _suffix(str(pattern))
    suffixes = (*KINDS, "tar", *((end,) if end in MANIFESTS else ()))
    found = [match for match in matches if match.is_dir() or _suffix(match.name) in suffixes]
    if not found:
        raise InputError(f"input {str(pattern)!r} matches no folder, no tar and no media file: correct the pattern")
    return found


def layout_of(path: Path) -> Layout:
    """What an existing input is."""
    if path.is_dir():
        return "folder"
    suffix = _suffix(path.name)
    return "media" if suffix in KINDS else "manifest" if suffix in MANIFESTS else "tar"


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _beside(path: Path) -> list[Sample | Fault]:
    """The sample that a picture or clip is with what lies beside it."""
    stem = path.name.partition(".")[0]
    beside = (path.with_name(f"{stem}.{suffix}") for suffix in ("txt", "json"))
    return _grouped(_folder_entries(path.parent, [path, *(other for other in beside if other.exists())]))


def _folder_entries(folder: Path, paths: Iterable[Path]) -> Iterator[tuple[str, str, Extent]]:
    for path in sorted(paths):
        if path.is_file():
            status = path.stat()
            extent = Extent(path=path, offset=0, size=status.st_size, stamp=status.st_mtime_ns)
            yield path.relative_to(folder).as_posix(), str(path), extent


def _tar_samples(path: Path) -> list[Sample | Fault]:
    """The samples of a tar. Of one that is cut off, damaged or unreadable from somewhere on, those before: the last of
    them may lack files, and goes with it."""
    entries: list[tuple[str, str, Extent]] = []
    fault, begun = None, False
    try:
        stamp = path.stat().st_mtime_ns
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                begun = True
                if member.isfile():
                    extent = Extent(path=path, offset=member.offset_data, size=member.size, stamp=stamp)
                    entries.append((member.name.removeprefix("./"), f"{path}:{member.name}", extent))
            # tarfile takes a header that it cannot read for the end of the archive, which is a block of zeros.
            tar.fileobj.seek(tar.offset)
            block = tar.fileobj.read(tarfile.BLOCKSIZE)
            if block != tarfile.NUL * tarfile.BLOCKSIZE:
                fault = f"damaged at byte {tar.offset}" if len(block) == tarfile.BLOCKSIZE else "cut off"
    except tarfile.TarError as error:
        fault = "cut off" if begun else str(error)
    except OSError as error:
        fault = f"unreadable ({error.strerror or error})"
        if not begun:
            return [_fault_of(path, fault)]
    if not begun and fault is not None:
        return [_fault_of(path, f"it is not an uncompressed tar ({fault})")]
    if fault is None or not entries:
        return _grouped(entries) or [_fault_of(path, f"it holds no picture and no clip ({fault or 'it is whole'})")]
    last = key_of(entries[-1][0])
    reason = f"the tar is {fault}: this sample may lack files, and what followed is lost"
    return [
        *_grouped(entry for entry in entries if key_of(entry[0]) != last),
        Fault(key=readable_name(last), source=readable_name(entries[-1][1]), reason=reason),
    ]


def _fault_of(path: Path, reason: str) -> Fault:
    return Fault(key=readable_name(path.stem), source=readable_name(str(path)), reason=reason)


def _grouped(entries: Iterable[tuple[str, str, Extent]]) -> list[Sample | Fault]:
    """Samples of entries (name, source, extent), sorted by key; other files are passed over.

    Of two pictures or clips under one key the first is the sample's, the other a fault.
    """
    parts: dict[str, dict[str, tuple[str, Extent]]] = {}
    found: dict[str, list[Sample | Fault]] = {}
    for name, source, extent in entries:
        _, _, suffix = name.rpartition("/")[2].partition(".")
        key = key_of(name)
        if name.rpartition("/")[2].startswith("."):  # hidden files
            continue
        files = parts.setdefault(key, {})
        suffix = suffix.lower()
        role = "media" if suffix in KINDS else OTHER_MEDIA if suffix.rpartition(".")[2] in KINDS else suffix
        if role in ("media", OTHER_MEDIA) and role in files:
            first = readable_name(files[role][0])
            fault = Fault(
                key=readable_name(key),
                source=readable_name(source),
                reason=f"two media files of one key: {first} is used",
            )
            found.setdefault(key, []).append(fault)
        else:
            files[role] = (source, extent)
    for key, files in parts.items():
        if "media" in files or OTHER_MEDIA in files:
            source, media = files.get("media") or files[OTHER_MEDIA]
            text, fields = (files[role][1] if role in files else None for role in ("txt", "json"))
            kind = KINDS[_suffix(source)]
            sample = Sample(key=readable_name(key), kind=kind, source=source, media=media, text=text, fields=fields)
            found.setdefault(key, []).insert(0, sample)
    return [entry for key in sorted(found) for entry in found[key]]

"""The samples of a WebDataset tar: its headers say where the bytes of each file are."""

import posixpath
import re
import tarfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from megatron_ext.media.groups import Entry, grouped, matters
from megatron_ext.media.members import key_of
from megatron_ext.media.samples import Extent, Fault, Sample, readable_name

_TAR_NAME = re.compile(r"\.(tar(\.(gz|bz2|xz|zst))?|tgz|tbz2?|txz|tzst)\Z", re.IGNORECASE)
_UNPACKED_BY = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
"""First bytes of compressed files."""

_MOST_LINKS = 40
"""Links to links that are followed: as many as Linux follows."""

_AT_ONCE = 1 << 20


def is_tar_name(name: str) -> bool:
    """Whether a name is that of a tar, compressed or not."""
    return _TAR_NAME.search(name) is not None


def tar_samples(path: Path) -> list[Sample | Fault]:
    """The samples of a tar; of several that were written one behind the other (`cat a.tar b.tar`), those of all.

    Of one that is cut off, damaged or unreadable from somewhere on, those before: the last of them may lack files, and
    goes with it.
    """
    try:
        with path.open("rb") as file:
            archives = list(_archives(path, file))
    except OSError as error:
        return [_fault_of(path, _unreadable(error))]
    first, last = archives[0], archives[-1]
    if first.fault is not None and not first.has_members:
        return [_fault_of(path, first.fault)]
    entries = [entry for archive in archives for entry in archive.entries()]
    if last is not first and not last.has_members:
        rest = _fault_of(path, f"from byte {last.start} on, behind its end, it is no tar: what is there is not read")
        return [*grouped(entries, in_tar=True), rest]
    if last.fault is None or not entries:
        why = last.fault or "it is whole"
        return grouped(entries, in_tar=True) or [_fault_of(path, f"it holds no picture and no clip ({why})")]
    cut = key_of(entries[-1].name)
    reason = f"the tar is {last.fault}: this sample may lack files, and what followed is lost"
    return [
        *grouped((entry for entry in entries if key_of(entry.name) != cut), in_tar=True),
        Fault(key=readable_name(cut), source=readable_name(entries[-1].source), reason=reason),
    ]


class _Archive:
    """One archive of a file."""

    def __init__(self, path: Path, file: BinaryIO, start: int) -> None:
        self.start = start
        self.end = start
        """Where its end mark begins."""
        self.has_members = False
        self.fault: str | None = None
        """What keeps the rest of it from being read."""
        self._path = path
        self._stamp = path.stat().st_mtime_ns
        self._found: list[tuple[Entry, str | None]] = []
        """Files, and links with the name of what they lead to."""
        self._contents: dict[str, Extent | str] = {}
        self._links: dict[str, str] = {}
        try:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    self.has_members = True
                    self._add(member)
                self.end = tar.offset
            # tarfile takes a header that it cannot read for the end of the archive, which is a block of zeros.
            file.seek(self.end)
            block = file.read(tarfile.BLOCKSIZE)
            if block != tarfile.NUL * tarfile.BLOCKSIZE:
                self.fault = f"damaged at byte {self.end}" if len(block) == tarfile.BLOCKSIZE else "cut off"
        except tarfile.TarError as error:
            self.fault = "cut off" if self.has_members else _no_tar(file, start, error)
        except OSError as error:
            self.fault = _unreadable(error)

    def entries(self) -> Iterator[Entry]:
        """Its files, links among them with the bytes of what they lead to; those to folders are passed over."""
        for entry, target in self._found:
            if target is None:
                yield entry
            elif (content := self._behind(target)) is not None:
                yield entry._replace(content=content)
            elif target not in self._folders:
                yield entry._replace(content=f"a link to {readable_name(target)!r}, which is not in the tar")

    def _add(self, member: tarfile.TarInfo) -> None:
        name, place = member.name.removeprefix("./"), posixpath.normpath(member.name)
        content, target = "neither a file nor a link", None
        if member.islnk():
            target = posixpath.normpath(member.linkname)
        elif member.issym():
            target = posixpath.normpath(posixpath.join(posixpath.dirname(place), member.linkname))
        elif member.issparse():
            content = "a sparse file, whose bytes do not stand together in the tar: pack it without --sparse"
        elif member.isfile():
            content = Extent(path=self._path, offset=member.offset_data, size=member.size, stamp=self._stamp)
        if target is not None:
            self._links[place] = target
        elif not member.isdir():
            self._contents.setdefault(place, content)
        if target is not None or isinstance(content, Extent) or (matters(name) and not member.isdir()):
            self._found.append((Entry(name, f"{self._path}:{member.name}", content), target))

    def _behind(self, target: str) -> Extent | str | None:
        for _ in range(_MOST_LINKS):
            if target in self._contents:
                return self._contents[target]
            if target not in self._links:
                return None
            target = self._links[target]
        return f"a link to {readable_name(target)!r}, which leads in a circle"

    @cached_property
    def _folders(self) -> set[str]:
        return {str(folder) for name in (*self._contents, *self._links) for folder in PurePosixPath(name).parents}


def _archives(path: Path, file: BinaryIO) -> Iterator[_Archive]:
    start: int | None = 0
    while start is not None:
        yield (archive := _Archive(path, file, start))
        start = None if archive.fault else _next_start(file, archive.end)


def _next_start(file: BinaryIO, end: int) -> int | None:
    """The block in which something stands behind an archive's end mark."""
    file.seek(end)
    while content := file.read(_AT_ONCE):
        if rest := content.lstrip(tarfile.NUL):
            place = end + len(content) - len(rest)
            return place - place % tarfile.BLOCKSIZE
        end += len(content)
    return None


def _no_tar(file: BinaryIO, start: int, error: tarfile.TarError) -> str:
    file.seek(start)
    head = file.read(max(map(len, _UNPACKED_BY)))
    for magic, tool in _UNPACKED_BY.items():
        if head.startswith(magic):
            return f"it is compressed, and samples are read where they lie: unpack it once ({tool})"
    return f"it is not an uncompressed tar ({error})"


def _unreadable(error: OSError) -> str:
    return f"unreadable ({error.strerror or error})"


def _fault_of(path: Path, reason: str) -> Fault:
    return Fault(key=readable_name(path.stem), source=readable_name(str(path)), reason=reason)

"""Pictures and clips with captions, from folders and tar files.

A folder is img2dataset's "files" output: KEY.jpg (or another picture or clip), KEY.txt with the caption, KEY.json with
more about it; sub-folders are searched. A tar is a WebDataset shard: members of one key stand together.
A key is the path without everything from the first dot of its last part.

Inputs are paths or glob patterns. Listing reads names only (of a tar, its headers); the bytes are read sample by
sample, in any order.
"""

import glob
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ext.config import InputError
from megatron_ext.media.errors import MediaError

KINDS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"), "image"),
    **dict.fromkeys(("mp4", "m4v", "webm", "mkv", "mov", "avi"), "video"),
}

# KEY.mask.png beside KEY.jpg is something else about the sample; alone it is a picture whose name has a dot.
OTHER_MEDIA = "other media"


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Bytes of a file."""

    path: Path
    """The file: one of the sample's own, or the tar that holds it."""

    offset: int
    """First byte."""

    size: int
    """Number of bytes."""

    stamp: int
    """Modification time of the file in nanoseconds, as it was listed."""

    def read(self) -> bytes:
        """The bytes.

        Raises:
            MediaError: the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            raise MediaError(f"cannot be read ({error.strerror})") from None

    def open(self) -> io.BufferedReader:
        """The bytes as a file that is read where it is looked at: a header costs a header.

        Raises:
            MediaError: the file cannot be opened.
        """
        try:
            return io.BufferedReader(_Window(self))
        except OSError as error:
            raise MediaError(f"cannot be read ({error.strerror})") from None


class _Window(io.RawIOBase):
    """The bytes of an extent as a file of their own."""

    def __init__(self, extent: Extent) -> None:
        super().__init__()
        self._size = extent.size
        self._offset = extent.offset
        self._position = 0
        self._file = extent.path.open("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._offset + self._position)
        read = self._file.readinto(memoryview(buffer)[:count])
        self._position += read
        return read

    def close(self) -> None:
        # A failed constructor leaves no file behind it.
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A picture or a clip, where its bytes are, and its captions."""

    key: str
    """Unique among the inputs."""

    kind: Literal["image", "video"]
    """A picture or a clip."""

    source: str
    """Path of the media file, for a tar followed by the member's name."""

    media: Extent
    """The encoded picture or clip."""

    text: Extent | None
    """KEY.txt: a caption."""

    fields: Extent | None
    """KEY.json: more captions, see `json_captions`."""

    def captions(self) -> tuple[str, ...]:
        """The captions, that of KEY.txt first, then those of KEY.json in its order; no empty one, none twice.

        Raises:
            MediaError: KEY.txt is not UTF-8, KEY.json is refused by `json_captions`, or one cannot be read.
        """
        found: list[str] = []
        if self.text:
            try:
                found.append(self.text.read().decode("utf-8"))
            except UnicodeDecodeError as error:
                raise MediaError(f"its captions are unreadable: {error}") from None
        if self.fields:
            found += json_captions(self.fields.read())
        return tuple(dict.fromkeys(caption.strip() for caption in found if caption.strip()))


def list_samples(inputs: Iterable[str | Path]) -> list[Sample]:
    """All samples of the folders, tars and media files, in the order given, within each by key.

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


def expand(pattern: str | Path) -> list[Path]:
    """What an input names: the path itself, or what a glob pattern (`*`, `?`, `[...]`, `**`) matches, sorted.

    A pattern's matches that are neither folders, tars nor media files, such as img2dataset's `00000_stats.json`, are
    passed over.

    Raises:
        InputError: there is no such path, or nothing that could hold media matches.
    """
    path = Path(pattern)
    if path.exists():
        return [path]
    if not glob.has_magic(str(pattern)):
        raise InputError(f"input {str(pattern)!r} is missing: give a folder of media files or a WebDataset tar")
    matches = map(Path, sorted(glob.glob(str(pattern), recursive=True)))
    found = [match for match in matches if match.is_dir() or _suffix(match.name) in (*KINDS, "tar")]
    if not found:
        raise InputError(f"input {str(pattern)!r} matches no folder, no tar and no media file: correct the pattern")
    return found


def samples_of(path: Path) -> list[Sample]:
    """The samples of one folder or tar, by key; of a picture or clip the sample that it is with what lies beside it.

    Raises:
        InputError: an input without media, unreadable, or with two media files of one key.
    """
    layout = layout_of(path)
    if layout == "folder":
        entries = _folder_entries(path, path.rglob("*"))
    elif layout == "media":
        stem = path.name.partition(".")[0]
        beside = (path.with_name(f"{stem}.{suffix}") for suffix in ("txt", "json"))
        entries = _folder_entries(path.parent, [path, *(other for other in beside if other.exists())])
    else:
        entries = _tar_entries(path)
    found = _grouped(entries)
    if not found:
        raise InputError(f"input {str(path)!r} holds no picture and no clip ({', '.join(KINDS)})")
    return found


def layout_of(path: Path) -> Literal["folder", "tar", "media"]:
    """What an existing input is: a folder of samples, a tar, or one picture or clip."""
    return "folder" if path.is_dir() else "media" if _suffix(path.name) in KINDS else "tar"


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def readable_name(name: str) -> str:
    """A path as it can be printed and written: what is not UTF-8 in it as `\\xNN`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def json_captions(content: bytes) -> list[str]:
    """The captions in img2dataset's .json: `caption`, `captions` (a list) and `caption_*` (another language), in order.

    Raises:
        MediaError: not a JSON object in UTF-8, or a caption with a lone surrogate, which no file could hold.
    """
    found: list[str] = []
    try:
        fields = json.loads(content.decode("utf-8"))
        if not isinstance(fields, dict):
            raise MediaError("its captions are unreadable: not a JSON object")
        for name, value in fields.items():
            if name == "captions" and isinstance(value, list):
                found += (item for item in value if isinstance(item, str))
            elif isinstance(value, str) and (name == "caption" or name.startswith("caption_")):
                found.append(value)
        "".join(found).encode("utf-8")
    except (UnicodeError, json.JSONDecodeError) as error:
        raise MediaError(f"its captions are unreadable: {error}") from None
    return found


def _folder_entries(folder: Path, paths: Iterable[Path]) -> Iterator[tuple[str, str, Extent]]:
    for path in sorted(paths):
        if path.is_file():
            status = path.stat()
            extent = Extent(path=path, offset=0, size=status.st_size, stamp=status.st_mtime_ns)
            yield path.relative_to(folder).as_posix(), str(path), extent


def _tar_entries(path: Path) -> Iterator[tuple[str, str, Extent]]:
    stamp = path.stat().st_mtime_ns
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    extent = Extent(path=path, offset=member.offset_data, size=member.size, stamp=stamp)
                    yield member.name.removeprefix("./"), f"{path}:{member.name}", extent
    except tarfile.TarError as error:
        raise InputError(f"input {str(path)!r} is not an uncompressed tar ({error})") from None


def _grouped(entries: Iterable[tuple[str, str, Extent]]) -> list[Sample]:
    """Samples of entries (name, source, extent), sorted by key; other files are passed over."""
    parts: dict[str, dict[str, tuple[str, Extent]]] = {}
    for name, source, extent in entries:
        folder, _, last = name.rpartition("/")
        stem, _, suffix = last.partition(".")
        if not stem:  # hidden files
            continue
        files = parts.setdefault(f"{folder}/{stem}" if folder else stem, {})
        suffix = suffix.lower()
        role = "media" if suffix in KINDS else OTHER_MEDIA if suffix.rpartition(".")[2] in KINDS else suffix
        if role in ("media", OTHER_MEDIA) and role in files:
            raise InputError(f"{files[role][0]} and {source}: two media files of one key")
        files[role] = (source, extent)
    samples = []
    for key, files in sorted(parts.items()):
        if "media" in files or OTHER_MEDIA in files:
            source, media = files.get("media") or files[OTHER_MEDIA]
            text, fields = (files[role][1] if role in files else None for role in ("txt", "json"))
            kind = KINDS[_suffix(source)]
            samples.append(Sample(key=key, kind=kind, source=source, media=media, text=text, fields=fields))
    return samples

"""A picture or a clip with its captions: where its bytes are, and how they are read."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megatron_ext.config import InputError
from megatron_ext.files import parse_json, suffix_of, text_of
from megatron_ext.media.cells import read_cell
from megatron_ext.media.errors import MediaError

KINDS = {
    **dict.fromkeys(("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "bmp", "gif", "tif", "tiff"), "image"),
    **dict.fromkeys(("mp4", "m4v", "webm", "mkv", "mov", "avi"), "video"),
}


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Bytes of a file, or of a row of a Parquet file."""

    path: Path
    """The file: one of the sample's own, or the tar or Parquet file that holds it."""

    offset: int
    """First byte; in a Parquet file the row, from 0."""

    size: int
    """Number of bytes."""

    stamp: int
    """Modification time of the file in nanoseconds, as it was listed."""

    def read(self) -> bytes:
        """The bytes.

        Raises:
            MediaError: the file cannot be read, or ends early.
        """
        if self._is_cell:
            return self._cell()
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise MediaError(f"cannot be read ({error.strerror})") from None
        if len(content) < self.size:
            raise MediaError(f"cannot be read (ends after {len(content)} of {self.size} bytes)")
        return content

    def open(self) -> BinaryIO:
        """The bytes as a file that is read where it is looked at: a header costs a header.

        Raises:
            MediaError: the file cannot be opened.
        """
        if self._is_cell:
            return io.BytesIO(self._cell())
        try:
            return io.BufferedReader(_Window(self))
        except OSError as error:
            raise MediaError(f"cannot be read ({error.strerror})") from None

    @property
    def _is_cell(self) -> bool:
        return suffix_of(self.path) == "parquet"

    def _cell(self) -> bytes:
        try:
            return read_cell(self.path, self.stamp, self.offset, tuple(KINDS))
        except InputError as error:
            raise MediaError(str(error)) from None


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
    """What the sample is called, always UTF-8; listing does not make sure that no other sample has it."""

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

    given: tuple[str, ...] = ()
    """Captions that a manifest gives."""

    def captions(self) -> tuple[str, ...]:
        """The captions, those given first, then KEY.txt, then KEY.json's in its order; no empty one, none twice.

        Raises:
            MediaError: KEY.txt is not UTF-8, KEY.json is refused by `json_captions`, or one cannot be read.
        """
        found: list[str] = list(self.given)
        if self.text:
            try:
                found.append(text_of(self.text.read()))
            except UnicodeDecodeError as error:
                raise MediaError(f"its captions are unreadable: {error}") from None
        if self.fields:
            found += json_captions(self.fields.read())
        return tuple(dict.fromkeys(caption.strip() for caption in found if caption.strip()))


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What listing found that cannot be used; all of it UTF-8."""

    key: str
    """What the sample would be called."""

    source: str
    """Where it is."""

    reason: str
    """Why it cannot be used."""


def readable_name(name: str) -> str:
    """A path as it can be printed and written: what is not UTF-8 in it as `\\xNN`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def json_captions(content: bytes) -> list[str]:
    """The captions in img2dataset's .json, as `captions_in` finds them.

    Raises:
        MediaError: not a JSON object in UTF-8, or a caption with a lone surrogate, which no file could hold.
    """
    try:
        fields = parse_json(content)
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
        found = captions_in(fields)
        "".join(found).encode("utf-8")
    except ValueError as error:  # of which those about JSON and Unicode are kinds
        raise MediaError(f"its captions are unreadable: {error}") from None
    return found


def captions_in(fields: Mapping[str, Any]) -> list[str]:
    """The captions among named values: `caption`, `captions` (a list) and `caption_*` (another language), in order."""
    found: list[str] = []
    for name, value in fields.items():
        if name == "captions" and isinstance(value, list):
            found += (item for item in value if isinstance(item, str))
        elif isinstance(value, str) and (name == "caption" or name.startswith("caption_")):
            found.append(value)
    return found

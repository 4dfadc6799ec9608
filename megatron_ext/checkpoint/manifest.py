"""The file that says what a checkpoint is: step, metadata, and the size and checksum of every file."""

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config.errors import InputError

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
OLDEST_FORMAT = 1
"""Format 1 has sizes and no checksums, and knows one optimizer format."""

CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """One file as it was written."""

    bytes: int
    crc32: int | None
    """None in format 1."""


@dataclass(frozen=True)
class Manifest:
    """A manifest of any format that can be read."""

    step: int
    metadata: dict[str, Any]
    files: dict[str, FileRecord]

    def missing_in(self, folder: Path) -> str | None:
        """Which file of `folder` is missing or has another size, in words; None when all are there."""
        for name, record in self.files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if (found := path.stat().st_size) != record.bytes:
                return f"{name} has {found} bytes, not {record.bytes}"
        return None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        InputError: it has none, it cannot be read, or its format is unknown.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} is not a complete checkpoint of this program: it has no {MANIFEST}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version in range(OLDEST_FORMAT, FORMAT_VERSION + 1):
            return Manifest(content["step"], content["metadata"], _file_records(content["files"], version))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a checkpoint's manifest ({type(error).__name__}: {error})") from None
    raise InputError(
        f"{folder} has checkpoint format {version}, and this program reads {OLDEST_FORMAT} to {FORMAT_VERSION}: "
        "use the version of the program that wrote it"
    )


def record_of(path: Path) -> FileRecord:
    """Size and checksum of a file, read from end to end."""
    size = crc32 = 0
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while count := file.readinto(buffer):
            crc32 = zlib.crc32(buffer[:count], crc32)
            size += count
    return FileRecord(size, crc32)


def sync_to_disk(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_records(files: dict[str, Any], version: int) -> dict[str, FileRecord]:
    if version == 1:
        return {name: FileRecord(size, None) for name, size in files.items()}
    return {name: FileRecord(**record) for name, record in files.items()}

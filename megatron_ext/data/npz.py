"""Arrays of an uncompressed .npz archive, memory-mapped: a sidecar of many documents is read only where it is asked."""

import struct
import zipfile
from pathlib import Path

import numpy as np

_LENGTHS_AT = 26
"""Offset, in a member's local header, of the lengths of its name and of its extra field (PKWARE APPNOTE 4.3.7)."""


def map_npz(path: Path) -> dict[str, np.ndarray]:
    """Every array of the archive by its name, read-only.

    Raises:
        OSError, ValueError, zipfile.BadZipFile: no such archive, or one that is compressed.
    """
    arrays = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed")
            file.seek(member.header_offset + _LENGTHS_AT)
            file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in read_header:
                raise ValueError(f"{member.filename} has version {version} of the npy format")
            shape, _, dtype = read_header[version](file)
            name = member.filename.removesuffix(".npy")
            if 0 in shape:  # an empty array cannot be mapped
                arrays[name] = np.empty(shape, dtype)
            else:
                arrays[name] = np.memmap(path, dtype, "r", file.tell(), shape)
    return arrays

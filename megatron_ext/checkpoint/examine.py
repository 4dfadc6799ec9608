"""What is wrong with a checkpoint that is not what was written: files, and tensors in them."""

import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ext.checkpoint.attempt import WEIGHTS
from megatron_ext.checkpoint.manifest import read_manifest, record_of
from megatron_ext.config.errors import InputError

METADATA = ".metadata"
"""torch.distributed.checkpoint's table of tensors, in the folder of the weights."""


@dataclass(frozen=True)
class Damage:
    """One file that is not what was written."""

    file: str
    what: str
    tensors: tuple[str, ...]
    """Names of the tensors whose bytes in it are damaged; none where it holds none, or they cannot be told."""


def damages(folder: Path) -> list[Damage]:
    """Every damaged file of a checkpoint's folder, in the order of names.

    Raises:
        InputError: not a checkpoint, or one without checksums (format 1).
    """
    manifest = read_manifest(folder)
    found = []
    for name, expected in sorted(manifest.files.items()):
        if expected.crc32 is None:
            raise InputError(f"{folder} has no checksums (format 1): nothing can be said of its contents")
        path = folder / name
        if not path.is_file():
            found.append(Damage(name, "is missing", ()))
        elif (actual := record_of(path)) != expected:
            cut = actual.bytes != expected.bytes
            what = f"has {actual.bytes:,} bytes, not {expected.bytes:,}" if cut else "has other contents"
            found.append(Damage(name, what, _damaged_tensors(path)))
    return found


def _damaged_tensors(path: Path) -> tuple[str, ...]:
    """Names of the tensors whose part of a file of weights is not whole.

    torch.save writes every part as a zip archive of its own, with a checksum for each record.
    """
    table = path.parent / METADATA
    if path.parent.name != WEIGHTS or path == table or not table.is_file():
        return ()
    try:
        places = pickle.loads(table.read_bytes()).storage_data
    except Exception:  # a damaged pickle fails in many ways
        return ()
    broken = []
    with path.open("rb") as file:
        for index, place in places.items():
            if place.relative_path == path.name:
                file.seek(place.offset)
                if not _is_whole(file.read(place.length)):
                    at = f" at {tuple(index.offset)}" if index.offset is not None and any(index.offset) else ""
                    broken.append(index.fqn + at)
    return tuple(sorted(broken))


def _is_whole(archive: bytes) -> bool:
    """Whether Python's reader finds no record with another checksum, and torch's, which looks at none but is stricter
    about what stands around them, finds them all. Nothing is unpickled.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as records:
            if records.testzip() is not None:
                return False
        reader = torch._C.PyTorchFileReader(io.BytesIO(archive))
        return all(reader.get_record(name) is not None for name in reader.get_all_records())
    except Exception:  # a damaged archive fails in many ways: its names, its version, its flags
        return False

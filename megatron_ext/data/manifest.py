"""What a dataset says about itself (PREFIX.manifest.json), and how its files appear: all at once."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ext.config import InputError

FORMAT_VERSION = 1

FILES = (".bin", ".idx", ".spans.npz")
"""The files whose size and hash the manifest holds."""

BLOCK_BYTES = 8 << 20
"""Of a file that is read piece by piece: a multiple of an id's four bytes."""

_PARTIAL = ".partial"
_ALL = (".vocabulary", ".bin", ".spans.npz", ".manifest.json", ".idx")  # in the order they appear
BESIDE_IDS = (".vocabulary", ".spans.npz", ".manifest.json")
"""What a dataset has beside the ids, in the order it appears."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset says about itself."""

    format_version: int
    vocabulary: str
    """Identity of the vocabulary."""
    vision_tokenizer: str | None
    """Identity of the vision tokenizer; None where there is no picture."""
    documents: Mapping[str, int]
    """Documents of each kind."""
    ids: Mapping[str, int]
    """Ids of the documents of each kind."""
    visual_ids: int
    """How many of all ids are visual."""
    longest: int
    """Ids of the longest document."""
    files: Mapping[str, Mapping[str, int | str]]
    """Bytes and sha256 of each file, by suffix."""
    sidecar: str
    """Digest of the sidecar."""

    @property
    def num_documents(self) -> int:
        return sum(self.documents.values())

    @property
    def num_ids(self) -> int:
        return sum(self.ids.values())

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Raises InputError: no manifest, or one this version cannot read."""
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            raise InputError(f"{path} is missing: give the prefix of a dataset that preprocess_data.py wrote") from None
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}") from None
        if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
            raise InputError(f"{path} is not of format version {FORMAT_VERSION}: preprocess the data again")
        try:
            return cls(**content)
        except TypeError as error:
            raise InputError(f"{path} is damaged ({error}): preprocess the data again") from None


def dataset_path(prefix: Path, suffix: str) -> Path:
    """A file of a dataset."""
    return prefix.with_name(prefix.name + suffix)


def partial_path(prefix: Path, suffix: str) -> Path:
    """Its name while the dataset is not complete."""
    return dataset_path(prefix, suffix + _PARTIAL)


def discard(prefix: Path) -> None:
    """Remove what is not complete."""
    for suffix in _ALL:
        path = partial_path(prefix, suffix)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def publish(prefixes: Sequence[Path], suffixes: Sequence[str] = _ALL) -> None:
    """Give the complete files of these datasets their names; older ones of these names are replaced.

    Without the last of `suffixes` an older dataset is none: at no moment, killed or not, a mixture of old and new
    passes as whole.

    Raises:
        OSError: a file cannot be written or renamed.
    """
    for prefix in prefixes:
        for path in (partial_path(prefix, suffix) for suffix in suffixes):
            flush(path)
    for prefix in prefixes:
        dataset_path(prefix, suffixes[-1]).unlink(missing_ok=True)
    for prefix in prefixes:
        shutil.rmtree(dataset_path(prefix, ".vocabulary"), ignore_errors=True)
        for suffix in suffixes:
            os.replace(partial_path(prefix, suffix), dataset_path(prefix, suffix))
        flush(prefix.parent)


def flush(path: Path) -> None:
    """Have the system write a file, or a folder and the files in it, to the disk: a node may lose its power."""
    for each in [*path.iterdir(), path] if path.is_dir() and path.suffix == _PARTIAL else [path]:
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_whole(prefix: Path) -> bool:
    """Whether a dataset of this version is there, its files as large as its manifest says."""
    try:
        manifest = Manifest.read(dataset_path(prefix, ".manifest.json"))
        return all(dataset_path(prefix, name).stat().st_size == manifest.files[name]["bytes"] for name in FILES)
    except (InputError, OSError, KeyError):
        return False


def blocks(path: Path) -> Iterator[bytes]:
    """A file of any size, piece by piece."""
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def file_facts(path: Path) -> dict[str, int | str]:
    """A file's bytes and sha256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

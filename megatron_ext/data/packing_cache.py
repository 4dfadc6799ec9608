"""The packed index on disk: built once by one process, memory-mapped by all.

A folder is complete or absent: it is written under a temporary name and renamed. A lock in the cache folder keeps the
others waiting while one process builds; the kernel frees it when that process ends, however it ends. Where locks do not
reach (some file systems offer none, or only within a node), several processes build, the first rename wins, and the
others take its folder.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.data.packing import PackedIndex

LOCK = "packing.lock"
"""One for a cache folder: at most one index is built at a time, so memory for one is enough."""

_log = logging.getLogger(__name__)


def cached_index(folder: Path, facts: Mapping[str, int | str], build: Callable[[], PackedIndex]) -> PackedIndex:
    """The index in `folder`, memory-mapped; built and written there first where it is absent, with `facts` as JSON.

    Raises:
        InputError: the folder cannot be written, or holds a damaged index; and what `build` raises.
    """
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder.parent / LOCK) as is_alone:
                if is_alone:
                    _remove_unfinished(folder.parent)
                # Listed, because a network file system may answer a look at the folder itself from its cache.
                if folder.name not in os.listdir(folder.parent):
                    _write(build(), facts, folder)
        except OSError as error:
            raise InputError(
                f"cannot write the packed index into {folder.parent} ({error.strerror}): set data.cache_dir"
            ) from None
    return _open(folder)


def _open(folder: Path) -> PackedIndex:
    arrays = {}
    try:
        for name in (field.name for field in fields(PackedIndex)):
            # An empty file cannot be mapped, and of these only the skipped documents may be none.
            arrays[name] = np.load(folder / f"{name}.npy", mmap_mode=None if name == "skipped_documents" else "r")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"the packed index {folder} is damaged ({error}): remove it, it will be rebuilt") from None
    return PackedIndex(**arrays)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Wait until no other process holds the lock; False where the file system has no locks."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            _log.warning("%s cannot be locked (%s): every process builds the packed index", path, error.strerror)
            yield False
        else:
            yield True


def _write(index: PackedIndex, facts: Mapping[str, int | str], folder: Path) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}{_unfinished_mark()}", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        for name, array in index.arrays().items():
            with (temporary / f"{name}.npy").open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())  # after a power cut the folder would else be there without its content
        (temporary / "shape.json").write_text(json.dumps(dict(facts), indent=1) + "\n")
        os.rename(temporary, folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():  # else another process was first
            raise


def _unfinished_mark() -> str:
    return f".{socket.gethostname()}."


def _remove_unfinished(cache: Path) -> None:
    """What builders of this machine left when they were killed; none is at work, for we hold the lock. Those of other
    machines may be, where locks do not reach them."""
    for unfinished in cache.glob(f"packing-*{_unfinished_mark()}*"):
        shutil.rmtree(unfinished, ignore_errors=True)

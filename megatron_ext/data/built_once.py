"""Folders that one process builds and all others find: packed indexes, copies from an object store.

A folder is complete or absent: it is written under a temporary name and renamed. A lock beside it keeps the others
waiting while one process builds; the kernel frees it when that process ends, however it ends. Where locks do not reach
(some file systems offer none, or only within a node), several processes build, the first rename wins, and the others
take its folder.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

LOCK = "build.lock"
"""One for all folders of a place: at most one is built at a time, so memory for one is enough."""

_log = logging.getLogger(__name__)


def build_once(folder: Path, fill: Callable[[Path], object]) -> None:
    """Return when `folder` is complete; where it is absent, `fill` a folder of another name first, which becomes it.

    Raises:
        OSError: it cannot be written; and what `fill` raises.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / LOCK) as is_alone:
        if is_alone:
            _remove_unfinished(folder.parent)
        # Listed, because a network file system may answer a look at the folder itself from its cache.
        if folder.name not in os.listdir(folder.parent):
            _build(folder, fill)


def _build(folder: Path, fill: Callable[[Path], object]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}{_unfinished_mark()}", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        fill(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                _flush(path)
        os.rename(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not (isinstance(error, OSError) and folder.is_dir()):  # else another process was first
            raise


def _flush(path: Path) -> None:
    """After a power cut a renamed folder would else be there without its content."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Wait until no other process holds the lock; False where the file system has no locks."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            _log.warning("%s cannot be locked (%s): every process builds for itself", path, error.strerror)
            yield False
        else:
            yield True


def _unfinished_mark() -> str:
    return f".unfinished-{socket.gethostname()}."


def _remove_unfinished(place: Path) -> None:
    """What builders of this machine left when they were killed; none is at work, for we hold the lock. Those of other
    machines may be, where locks do not reach them."""
    for unfinished in place.glob(f"*{_unfinished_mark()}*"):
        shutil.rmtree(unfinished, ignore_errors=True)

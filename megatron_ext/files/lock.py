"""One start at a time writes to a run folder."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_ext.config import InputError

PATIENCE_S = 60.0
"""For the ranks of a start before, which may be saving their last checkpoint."""

SECONDS_BETWEEN_TRIES = 0.1


@contextlib.contextmanager
def alone_in(path: Path, say: Callable[[str], None], patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold the lock of the file at `path` while open: two starts in one folder would mix their metrics and checkpoints.

    The system gives the lock back when its holder ends, however it ends. Where the file system has none, nothing is
    held. `say` takes the line that tells what is waited for.

    Raises:
        InputError: another process still holds it after `patience_s`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline, has_told = time.monotonic() + patience_s, False
        while not _is_ours(descriptor):
            if time.monotonic() >= deadline:
                raise InputError(
                    f"observe.run_dir {str(path.parent)!r} is in use: another start of this run still writes there; "
                    "wait for its end or stop it, or give another folder"
                )
            if not has_told:
                say(f"waiting up to {patience_s:g} s for another start in {path.parent} to end")
                has_told = True
            time.sleep(SECONDS_BETWEEN_TRIES)
        yield
    finally:
        os.close(descriptor)


def _is_ours(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # such as a network file system mounted without locks
        pass
    return True

"""Processes as /proc shows them at this moment; a process, or thread, that ends meanwhile is one that has ended."""

import glob
from pathlib import Path


def is_running(pid: int) -> bool:
    """Whether it has not ended, reaped by its parent or not yet (a zombie)."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()[:1] not in ([], ["Z"], ["X"])


def children_of(pid: int) -> list[int]:
    """The running processes that it has started, whichever of its threads did."""
    lists = glob.glob(f"/proc/{pid}/task/*/children")
    found = [int(child) for path in lists for child in _read(path).split()]
    return [child for child in found if is_running(child)]


def command_of(pid: int) -> str:
    """What it was started with, in one line; nothing of one that has ended."""
    return _read(f"/proc/{pid}/cmdline").replace("\0", " ")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="surrogateescape")
    except OSError:  # it ended before the file was opened, ENOENT, or before it was read, ESRCH
        return ""

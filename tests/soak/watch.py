"""What happens in a run folder, the moment it happens: Linux's inotify, so that a kill falls inside a save."""

import ctypes
import os
import re
import select
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MODIFIED, _CLOSED, _RENAMED, _MADE = 0x2, 0x8, 0x80, 0x100  # linux/inotify.h
_NAMES = {_MODIFIED: "changed", _CLOSED: "closed", _RENAMED: "renamed", _MADE: "made"}
_HEADER = struct.Struct("iIII")
_LIBC = ctypes.CDLL(None, use_errno=True)

_FOLLOWED = re.compile(r"checkpoints/\.partial-\d{8}-[^/]+(/decoder)?")
"""Folders that are watched from the moment they are there."""


@dataclass(frozen=True)
class Event:
    """What happened to a path."""

    what: str
    """made, changed, closed (by who wrote it) or renamed (to this)."""
    path: str
    """Relative to the run folder."""


class Watch:
    """The events of one run folder."""

    def __init__(self, run: Path) -> None:
        """From now on; the folder and its `checkpoints` are made where they are not there."""
        self._run = run
        self._paths: dict[int, str] = {}
        self._waiting: list[Event] = []
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        self._descriptor = _LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1 failed")
        self._add("")
        self._add("checkpoints")

    def events(self, seconds: float) -> Iterator[Event]:
        """Events as they come, for so long."""
        deadline = time.monotonic() + seconds
        while True:
            while self._waiting:
                yield self._waiting.pop(0)
            left = deadline - time.monotonic()
            if left <= 0:
                return
            if select.select([self._descriptor], [], [], left)[0]:
                self._read()

    def forget(self) -> None:
        """Drop what has happened so far."""
        while select.select([self._descriptor], [], [], 0)[0]:
            self._read()
        self._waiting.clear()

    def close(self) -> None:
        """Stop watching."""
        os.close(self._descriptor)

    def _add(self, path: str) -> None:
        place = str(self._run / path).encode()
        number = _LIBC.inotify_add_watch(self._descriptor, place, _MODIFIED | _CLOSED | _RENAMED | _MADE)
        if number < 0:
            return  # it is gone again
        self._paths[number] = path
        if _FOLLOWED.fullmatch(path):  # what was made before the watch was there
            for name in _names_in(self._run / path):
                self._note("made", f"{path}/{name}")

    def _read(self) -> None:
        content = os.read(self._descriptor, 1 << 16)
        place = 0
        while place < len(content):
            number, mask, _, length = _HEADER.unpack_from(content, place)
            place += _HEADER.size
            name = content[place : place + length].rstrip(b"\0").decode()
            place += length
            folder = self._paths.get(number)
            for bit, what in _NAMES.items():
                if folder is not None and mask & bit and name:
                    self._note(what, f"{folder}/{name}" if folder else name)

    def _note(self, what: str, path: str) -> None:
        self._waiting.append(Event(what, path))
        if what == "made" and _FOLLOWED.fullmatch(path):
            self._add(path)


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []

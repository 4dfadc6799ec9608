"""What a user's path names: what is called so, else what it matches as a pattern. Searches follow links."""

import fnmatch
import glob
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from megatron_ext.config import InputError

LOST_AND_FOUND = "lost+found"
"""A file system's own folder, which only its administrator may read: what a check of the disk found."""


def suffix_of(name: str | Path) -> str:
    """What stands behind the last dot of a file's name, in small letters: `A.JSONL` is as good as `a.jsonl`."""
    _, dot, suffix = os.path.basename(os.fspath(name)).rpartition(".")
    return suffix.lower() if dot else ""


def named(pattern: str | Path, option: str) -> list[Path]:
    """What a user's path or pattern, given as `option`, names: each once, sorted.

    What exists names itself, whatever its characters: `photo [1].jpg` is a file before it is a pattern, and so is each
    part of a path, as in `[2023] photos/*.tar`. Otherwise `*`, `?` and `[...]` match as a shell's do, and `**` any
    folders below, as `walk` finds them.

    Raises:
        InputError: there is nothing, or a folder that the pattern goes through cannot be read.
    """
    text = os.fspath(pattern)
    if os.path.exists(text):
        return [Path(text)]
    found = _matches(Path(text), option) if glob.has_magic(text) else []
    if text.endswith(os.sep):
        found = [path for path in found if path.is_dir()]
    if found:
        return found
    where = f"check the path, relative to {Path.cwd()}"
    if glob.has_magic(text):
        what = "no file has this name, and taken as a pattern (`*`, `?`, `[...]`) it fits none"
        raise InputError(f"{option} {text!r} matches no file and no folder: {what}; {where}")
    raise InputError(f"{option} {text!r} is missing ({_why_missing(text)}): {where}")


def files_named(pattern: str | Path, option: str) -> list[Path]:
    """The files among what `named` finds.

    Raises:
        InputError: as `named`, or there are folders alone.
    """
    found = [path for path in named(pattern, option) if not path.is_dir()]
    for path in found:
        if not path.exists():
            raise InputError(f"{option} {str(pattern)!r}: {path} is a link that leads nowhere: mend or remove it")
    if not found:
        raise InputError(f"{option} {str(pattern)!r} matches no file, folders alone: name their files, as in FOLDER/*")
    return found


def walk(
    folder: Path, on_unreadable: Callable[[Path, OSError], object], *, hidden: bool = True
) -> Iterator[tuple[Path, list[os.DirEntry]]]:
    """(folder, what it holds beside folders, by name) of a folder and of all folders below it.

    Links to folders are followed, and each folder is searched once: under its own name where it lies below, else under
    the first link to it; so links may lead in circles. `on_unreadable` is told of folders that cannot be read.
    """
    seen: set[str] = set()
    # With their paths free of links. Links wait until all that lies below has been searched under its own name.
    waiting, links = deque([(folder, os.path.realpath(folder))]), deque()
    while waiting or links:
        place, real = (waiting or links).popleft()
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(place) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if place.name != LOST_AND_FOUND:
                on_unreadable(place, error)
            continue
        folders, files = [], []
        for entry in entries:
            (folders if _is_folder(entry) else files).append(entry)
        yield place, files
        for entry in folders:
            if hidden or not entry.name.startswith("."):
                is_link = entry.is_symlink()
                target = os.path.realpath(entry) if is_link else os.path.join(real, entry.name)
                (links if is_link else waiting).append((place / entry.name, target))


def _matches(pattern: Path, option: str) -> list[Path]:
    found = [Path(pattern.anchor)]
    parts = pattern.parts[1:] if pattern.anchor else pattern.parts
    for number, part in enumerate(parts, 1):
        is_last = number == len(parts)
        found = [match for place in found for match in _within(place, part, is_last, option)]
    return sorted(set(found) - {Path()})  # `**` alone would name the current folder, too


def _within(place: Path, part: str, is_last: bool, option: str) -> list[Path]:
    """What one part of a pattern names in a folder."""

    def refuse(folder: Path, error: OSError) -> NoReturn:
        raise InputError(f"{option}: cannot search folder {folder} ({error.strerror}): check its permissions") from None

    if os.path.exists(place / part):
        return [place / part]
    if not glob.has_magic(part) or not place.is_dir():
        return []
    if part == "**":
        found = []
        for folder, files in walk(place, refuse, hidden=False):
            found.append(folder)
            found += [folder / file.name for file in files if is_last and not file.name.startswith(".")]
        return found
    try:
        names = fnmatch.filter(os.listdir(place), part)
    except OSError as error:
        refuse(place, error)
    return [place / name for name in names if part.startswith(".") or not name.startswith(".")]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle, or to where nothing may be looked at
        return False


def _why_missing(text: str) -> str:
    try:
        os.stat(text)
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return "it was not there a moment ago"

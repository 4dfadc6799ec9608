"""Atomic checkpoint folders: a reader sees a whole checkpoint or none, whenever the writer is killed.

    ROOT/step_00000100/...          what the writer function wrote
    ROOT/step_00000100/manifest.json   step, metadata, size of every file; written last inside the folder
    ROOT/latest                     name of the newest complete folder; moved last of all
    ROOT/.partial-*                 an attempt in progress, or what a killed one left; never read

One run writes to a root; any number of programs may read it meanwhile.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ext.config import InputError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
PARTIAL = ".partial-"
STEP_FOLDER = re.compile(r"step_(\d{8,})")


class CheckpointStore:
    """Writes the checkpoints of one run. Every rank holds one and calls `write`; rank 0 does the bookkeeping."""

    def __init__(
        self,
        root: str | Path,
        keep: int,
        *,
        is_main: bool = True,
        barrier: Callable[[], None] = lambda: None,
        broadcast: Callable[[str], str] = lambda name: name,
    ) -> None:
        """`keep` is how many of the newest checkpoints stay; `broadcast` gives every rank the main rank's string.

        Raises:
            InputError: `keep` is below 1.
        """
        if keep < 1:
            raise InputError(f"checkpoint.keep is {keep}: keep at least 1")
        self.root = Path(root)
        self.keep = keep
        self._is_main = is_main
        self._barrier = barrier
        self._broadcast = broadcast

    def write(self, step: int, writer: Callable[[Path], None], metadata: dict[str, Any]) -> Path:
        """Make checkpoint `step` of what `writer(folder)` writes, on every rank, into an empty folder.

        A rank on another node must fsync its own files (torch's FileSystemWriter does); rank 0 syncs what it can see.
        A checkpoint of the same step is replaced. `metadata` (JSON data, main rank's) comes back from `read_metadata`.
        """
        # A name per attempt: a straggler of a killed attempt cannot write into this one.
        partial = self.root / self._broadcast(f"{PARTIAL}{step:08d}-{uuid.uuid4().hex[:8]}")
        final = self.root / f"step_{step:08d}"
        if self._is_main:
            self.root.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            partial.mkdir()
        self._barrier()
        writer(partial)
        self._barrier()
        if self._is_main:
            _seal(partial, step, metadata)
            self._publish(partial, final)
            self._remove_old(step)
        self._barrier()
        return final

    def latest(self) -> Path | None:
        """The newest complete checkpoint of this root, see `latest_checkpoint`."""
        return latest_checkpoint(self.root)

    def _publish(self, partial: Path, final: Path) -> None:
        """Give the sealed folder its name, then point `latest` at it."""
        if final.exists():
            self._discard(final)
        partial.rename(final)
        _fsync(self.root)
        pointer = self.root / f"{PARTIAL}latest-{uuid.uuid4().hex[:8]}"
        pointer.write_text(final.name + "\n", encoding="utf-8")
        _fsync(pointer)
        os.replace(pointer, self.root / LATEST)
        _fsync(self.root)

    def _remove_old(self, step: int) -> None:
        """Drop all but the newest `keep` up to `step`; later ones, left by going back to an older, are the user's."""
        steps = sorted(number for number in _steps(self.root) if number <= step)
        for number in steps[: -self.keep]:
            self._discard(self.root / f"step_{number:08d}")

    def _discard(self, folder: Path) -> None:
        # Renamed first: a kill during the removal must not leave half a checkpoint under a good name.
        doomed = self.root / f"{PARTIAL}{folder.name}-{uuid.uuid4().hex[:8]}"
        folder.rename(doomed)
        shutil.rmtree(doomed)

    def _remove_leftovers(self) -> None:
        for path in self.root.glob(f"{PARTIAL}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def latest_checkpoint(root: str | Path) -> Path | None:
    """The complete checkpoint that ROOT/latest names; None where no checkpoint has been completed.

    Raises:
        InputError: `latest` names a folder that is missing or incomplete.
    """
    pointer = Path(root) / LATEST
    if not pointer.exists():
        return None
    name = pointer.read_text().strip()
    folder = Path(root) / name
    if not STEP_FOLDER.fullmatch(name) or not folder.is_dir():
        others = ", ".join(f"step_{number:08d}" for number in _steps(Path(root))) or "none"
        raise InputError(
            f"{pointer} names {name!r}, which is not there: write the name of one that is ({others}) into it"
        )
    read_metadata(folder)
    return folder


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """The `metadata` a checkpoint was written with, and its `step`.

    Raises:
        InputError: not a checkpoint folder, an unknown format version, a file missing or of another size.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}; name a step_XXXXXXXX folder")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, step, metadata, files = (manifest[key] for key in ("format_version", "step", "metadata", "files"))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / MANIFEST} is not a checkpoint manifest ({error}): use another checkpoint"
        ) from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{folder} has checkpoint format {version}, this program reads {FORMAT_VERSION}: match the versions"
        )
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, not {size}"
            raise InputError(f"{folder} is incomplete: {name} {state}; use another checkpoint")
    return {**metadata, "step": step}


def _seal(folder: Path, step: int, metadata: dict[str, Any]) -> None:
    """Force the folder's content to disk and write its manifest."""
    paths = sorted(folder.rglob("*"))
    files = {str(path.relative_to(folder)): path.stat().st_size for path in paths if path.is_file()}
    manifest = {"format_version": FORMAT_VERSION, "step": step, "metadata": metadata, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    for path in (*paths, folder / MANIFEST, folder):
        _fsync(path)


def _steps(root: Path) -> list[int]:
    """Steps of the checkpoints under `root`, in order."""
    if not root.is_dir():
        return []
    matches = (STEP_FOLDER.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def _fsync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Atomic checkpoint folders: a reader sees a whole checkpoint or none, whenever the writer is killed.

    ROOT/step_00000100/...          what was written
    ROOT/step_00000100/manifest.json   step, metadata, size and checksum of every file; written last inside the folder
    ROOT/latest                     name of the newest complete folder; moved last of all
    ROOT/.partial-*                 an attempt in progress, or what a killed one left; never read

One run writes to a root; any number of programs may read it meanwhile.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from megatron_ext.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    FileRecord,
    Manifest,
    read_manifest,
    record_of,
    sync_to_disk,
)
from megatron_ext.config.errors import InputError

LATEST = "latest"
PARTIAL = ".partial-"
STEP_FOLDER = re.compile(r"step_(\d{8,})")

T = TypeVar("T")


def _here(compute: Callable[[], T]) -> T:
    return compute()


class CheckpointStore:
    """Writes the checkpoints of one run. Every rank holds one and calls its methods together with the others."""

    def __init__(
        self,
        root: str | Path,
        keep: int,
        *,
        keep_every: int | None = None,
        from_main: Callable[[Callable[[], Any]], Any] = _here,
        barrier: Callable[[], None] = lambda: None,
    ) -> None:
        """`keep` is how many of the newest checkpoints stay, and those of steps divisible by `keep_every` all do;
        `from_main(f)` is the main rank's f(), on every rank.
        """
        self._keep_every = keep_every
        self.root = Path(root)
        self.keep = keep
        self._from_main = from_main
        self._barrier = barrier

    def write(self, step: int, writer: Callable[[Path], None], metadata: Mapping[str, Any]) -> Path:
        """Make checkpoint `step` of what `writer(folder)` writes, on every rank, into an empty folder: `begin`, write,
        `commit`.
        """
        partial = self.begin(step)
        writer(partial)
        self._barrier()
        return self.commit(partial, step, metadata)

    def begin(self, step: int) -> Path:
        """A new empty folder for an attempt at checkpoint `step`; what earlier attempts left is removed."""
        return self._from_main(lambda: self._make_partial(step))

    def commit(
        self, partial: Path, step: int, metadata: Mapping[str, Any], written: Mapping[str, FileRecord] | None = None
    ) -> Path:
        """Make the folder of `begin` checkpoint `step`, once every rank has written its files there.

        `written` (name inside the folder -> record) is what the main rank knows of the writers' files: a size that it
        does not find is an OSError. It reads the checksums of all others. A rank on another node must fsync its own
        files; the main rank syncs what it can see. A checkpoint of the same step is replaced. `metadata` (JSON data,
        the main rank's) comes back from `read_metadata`.
        """
        return self._from_main(lambda: self._commit(partial, step, metadata, written or {}))

    def latest(self) -> Path | None:
        """The newest complete checkpoint of this root, see `latest_checkpoint`."""
        return latest_checkpoint(self.root)

    def _make_partial(self, step: int) -> Path:
        # A name per attempt: a straggler of a killed attempt cannot write into this one.
        partial = self.root / f"{PARTIAL}{step:08d}-{uuid.uuid4().hex[:8]}"
        self.root.mkdir(parents=True, exist_ok=True)
        for path in self.root.glob(f"{PARTIAL}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        partial.mkdir()
        return partial

    def _commit(self, partial: Path, step: int, metadata: Mapping[str, Any], written: Mapping[str, FileRecord]) -> Path:
        final = self.root / f"step_{step:08d}"
        _seal(partial, step, metadata, written)
        self._publish(partial, final)
        self._remove_old(step)
        return final

    def _publish(self, partial: Path, final: Path) -> None:
        """Give the sealed folder its name, then point `latest` at it."""
        if final.exists():
            self._discard(final)
        partial.rename(final)
        sync_to_disk(self.root)
        pointer = self.root / f"{PARTIAL}latest-{uuid.uuid4().hex[:8]}"
        pointer.write_text(final.name + "\n", encoding="utf-8")
        sync_to_disk(pointer)
        os.replace(pointer, self.root / LATEST)
        sync_to_disk(self.root)

    def _remove_old(self, step: int) -> None:
        """Drop all up to `step` but the newest `keep` and what is kept for good; later ones, left by going back to an
        older, are the user's."""
        numbers = [number for number in _steps(self.root) if number <= step]
        for number in numbers[: -self.keep]:
            if self._keep_every is not None and number % self._keep_every == 0:
                continue
            self._discard(self.root / f"step_{number:08d}")

    def _discard(self, folder: Path) -> None:
        # Renamed first: a kill during the removal must not leave half a checkpoint under a good name.
        doomed = self.root / f"{PARTIAL}{folder.name}-{uuid.uuid4().hex[:8]}"
        folder.rename(doomed)
        shutil.rmtree(doomed)


def latest_checkpoint(root: str | Path) -> Path | None:
    """The complete checkpoint that ROOT/latest names; None where no checkpoint has been completed.

    Raises:
        InputError: `latest` names a folder that is missing or damaged.
    """
    pointer = Path(root) / LATEST
    if not pointer.exists():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    folder = Path(root) / name
    if not STEP_FOLDER.fullmatch(name) or not folder.is_dir():
        raise InputError(f"{pointer} names {name!r}, which is not there; {way_back(folder)}")
    read_metadata(folder)
    return folder


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """The `metadata` a checkpoint was written with, and its `step`.

    Raises:
        InputError: not a checkpoint folder, an unknown format version, a file missing or of another size.
    """
    manifest = _manifest_of(Path(folder))
    return {**manifest.metadata, "step": manifest.step}


def check_contents(folder: str | Path, *, part: int = 0, parts: int = 1) -> None:
    """Read the files of a checkpoint and compare checksums: every `parts`-th file, from number `part` on.

    Raises:
        InputError: a file is not what was written.
    """
    folder = Path(folder)
    for name, expected in sorted(_manifest_of(folder).files.items())[part::parts]:
        if expected.crc32 is not None and record_of(folder / name) != expected:
            raise damaged(folder, f"{name} is not what was written")


def damaged(folder: Path, what: str) -> InputError:
    """The refusal of a checkpoint, with the way to the newest complete one beside it."""
    return InputError(f"{folder} is damaged: {what}; {way_back(folder)}")


def way_back(folder: Path) -> str:
    """What to do without checkpoint `folder`: the newest complete one before it, else after it, and how to take it."""
    bad = STEP_FOLDER.fullmatch(folder.name)
    before, after = [], []
    for number in _steps(folder.parent):
        if _is_complete(folder.parent / f"step_{number:08d}") and not (bad and number == int(bad[1])):
            (before if not bad or number < int(bad[1]) else after).append(number)
    if not before and not after:
        return "there is no complete checkpoint beside it: start another observe.run_dir, or use another checkpoint"
    good = f"step_{(before or after)[-1]:08d}"
    return f"{good} beside it is complete: to go on from there, run `echo {good} > {folder.parent / LATEST}`"


def _manifest_of(folder: Path) -> Manifest:
    """The manifest of a checkpoint that has all its files."""
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        raise InputError(f"{error}; {way_back(folder)}") from None
    what = manifest.missing_in(folder)
    if what is not None:
        raise damaged(folder, what)
    return manifest


def _is_complete(folder: Path) -> bool:
    try:
        return read_manifest(folder).missing_in(folder) is None
    except (InputError, OSError):  # OSError: a run removes old ones while another program looks
        return False


def _seal(folder: Path, step: int, metadata: Mapping[str, Any], written: Mapping[str, FileRecord]) -> None:
    """Check what the writers say, force the folder's content to disk and write its manifest."""
    paths = sorted(folder.rglob("*"))
    found = {str(path.relative_to(folder)): path for path in paths if path.is_file()}
    for name, record in written.items():
        size = found[name].stat().st_size if name in found else None
        if size != record.bytes:
            raise OSError(f"{folder / name} has {size} bytes here, and its writer wrote {record.bytes}")
    files = {name: vars(written.get(name) or record_of(path)) for name, path in found.items()}
    manifest = {"format_version": FORMAT_VERSION, "step": step, "metadata": dict(metadata), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    for path in (*paths, folder / MANIFEST, folder):
        sync_to_disk(path)


def _steps(root: Path) -> list[int]:
    """Steps of the checkpoints under `root`, in order."""
    if not root.is_dir():
        return []
    matches = (STEP_FOLDER.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)

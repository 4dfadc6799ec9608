"""Arrays that are computed once and memory-mapped by all: a folder of .npy files, whole or absent (built_once.py)."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_ext.config import InputError, reason_of
from megatron_ext.data.built_once import build_once

_BARE = 128
"""Bytes of a .npy file without content: an empty array cannot be mapped."""


def stamp(path: Path) -> tuple[str, int, int]:
    """Tells a file's content from another without reading it: path, time of change, size."""
    facts = path.stat()
    return path.as_posix(), facts.st_mtime_ns, facts.st_size


def digest(facts: object) -> str:
    """Names the folder of what `facts`, plain data, determine."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def cached_arrays(
    folder: Path, names: Sequence[str], facts: Mapping[str, object], build: Callable[[], Mapping[str, np.ndarray]],
    *, what: str, remedy: str,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The arrays `names` in `folder`, memory-mapped; built and written there first where it is absent, with `facts` as
    JSON. `what` they are, and the `remedy` for a folder that cannot be written, stand in the messages.

    Raises:
        InputError: the folder cannot be written, or holds a damaged array; and what `build` raises.
    """

    def fill(target: Path) -> None:
        for name, array in build().items():
            np.save(target / f"{name}.npy", array)
        (target / "shape.json").write_text(json.dumps(dict(facts), indent=1) + "\n")

    try:
        build_once(folder, fill)
    except OSError as error:
        raise InputError(f"cannot write {what} into {folder.parent} ({reason_of(error)}): {remedy}") from None
    try:
        return {name: _load(folder / f"{name}.npy") for name in names}
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{what} {folder} is damaged ({reason_of(error)}): remove it, it will be rebuilt") from None


def _load(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r" if path.stat().st_size > _BARE else None)

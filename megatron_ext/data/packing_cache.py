"""The packed index on disk: built once, memory-mapped by all."""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.data.built_once import build_once
from megatron_ext.data.packing import PackedIndex


def cached_index(folder: Path, facts: Mapping[str, int | str], build: Callable[[], PackedIndex]) -> PackedIndex:
    """The index in `folder`, memory-mapped; built and written there first where it is absent, with `facts` as JSON.

    Raises:
        InputError: the folder cannot be written, or holds a damaged index; and what `build` raises.
    """

    def fill(target: Path) -> None:
        for name, array in build().arrays().items():
            np.save(target / f"{name}.npy", array)
        (target / "shape.json").write_text(json.dumps(dict(facts), indent=1) + "\n")

    try:
        build_once(folder, fill)
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

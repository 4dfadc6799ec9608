"""The packed index on disk: built once, memory-mapped by all."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path

from megatron_ext.data.array_cache import cached_arrays
from megatron_ext.data.packing import PackedIndex


def cached_index(folder: Path, facts: Mapping[str, int | str], build: Callable[[], PackedIndex]) -> PackedIndex:
    """The index in `folder`, memory-mapped; built and written there first where it is absent, with `facts` as JSON.

    Raises:
        InputError: the folder cannot be written, or holds a damaged index; and what `build` raises.
    """
    names = [field.name for field in fields(PackedIndex)]
    arrays = cached_arrays(
        folder, names, facts, lambda: build().arrays(), what="the packed index", remedy="set data.cache_dir"
    )
    return PackedIndex(**arrays)

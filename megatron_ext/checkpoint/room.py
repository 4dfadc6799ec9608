"""Whether the disk has room for a run's checkpoints, before the first step is spent."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.checkpoint.store import PARTIAL, STEP_FOLDER
from megatron_ext.config.errors import InputError

if TYPE_CHECKING:  # a job is checked where torch is not installed
    from torch import nn

OPTIMIZER_BYTES = 12
"""Per parameter, in every precision: master weight and two moments of Adam in 32 bits."""


def checkpoint_bytes(model: "nn.Module", tensor_parallel_size: int) -> int:
    """Size of one checkpoint of `model` (this rank's shard) with its optimizer, without some kilobytes of headers."""
    return sum(
        parameter.numel()
        * (tensor_parallel_size if getattr(parameter, "tensor_model_parallel", False) else 1)
        * (parameter.element_size() + OPTIMIZER_BYTES)
        for parameter in model.parameters()
    )


def check_room(root: Path, bytes_each: int, keep: int) -> None:
    """Raise InputError unless the disk of `root` has room for `keep` checkpoints and the next one, those counted that
    are there.
    """
    there = root
    while not there.exists():
        there = there.parent
    folders = [path for path in root.iterdir() if path.is_dir()] if there == root else []
    complete = sum(bool(STEP_FOLDER.fullmatch(path.name)) for path in folders)
    leftovers = [path for path in folders if path.name.startswith(PARTIAL)]  # the next save removes them
    free = shutil.disk_usage(there).free + sum(_bytes_in(path) for path in leftovers)
    more = max(1, keep + 1 - complete)
    if free < more * bytes_each:
        raise InputError(
            f"{root} needs {more * bytes_each:,} bytes for {more} more checkpoints of {bytes_each:,} (checkpoint.keep "
            f"{keep} and the next one) and its disk has {free:,} free: free some, lower checkpoint.keep, or move "
            "observe.run_dir"
        )


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

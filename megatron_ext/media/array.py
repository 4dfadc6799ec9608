"""Which shard of the work a job does: one process of many, each with its part of the same list of inputs."""

import os
from dataclasses import dataclass

from megatron_ext.config import InputError
from megatron_ext.config.section import Count, Number, Section

TASK_ID, TASK_FIRST, TASK_COUNT, TASK_STEP = (f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "COUNT", "STEP"))
"""What Slurm sets in every task of a job array (sbatch(1), "OUTPUT ENVIRONMENT VARIABLES")."""


@dataclass(frozen=True, kw_only=True)
class ShardConfig(Section):
    """The options of a program of which many jobs may share the inputs."""

    shard_index: Number | None = None
    """Which share of the inputs this job does, from 0; null takes the task of Slurm's job array, else all."""

    num_shards: Count | None = None
    """Number of jobs that share the inputs; null takes the size of Slurm's job array, else 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        index, count = self.shard_index, self.num_shards
        if (index is None) != (count is None):
            given, missing = ("shard_index", "num_shards") if count is None else ("num_shards", "shard_index")
            value = index if count is None else count
            raise InputError(f"{given} {value} without {missing}: give both, or neither inside a job array")
        if index is not None and index >= count:
            raise InputError(f"shard_index {index} with num_shards {count}: shards are numbered from 0 to {count - 1}")


def shard_of_job(shard_index: int | None, num_shards: int | None) -> tuple[int, int]:
    """(index from 0, number of shards) from a program's options, else from Slurm's job array, else (0, 1).

    Task ids may start anywhere and go in steps (`--array=3-11:4` has shards 0, 1, 2).

    Raises:
        InputError: an array with holes (`--array=1,5,6`), whose ids do not say which shard is whose.
    """
    if shard_index is not None and num_shards is not None:
        return shard_index, num_shards
    return _shard_of_array() if os.environ.get(TASK_ID) else (0, 1)


def _shard_of_array() -> tuple[int, int]:
    try:
        task, first, count = (int(os.environ[name]) for name in (TASK_ID, TASK_FIRST, TASK_COUNT))
        step = int(os.environ.get(TASK_STEP) or 1)
    except (KeyError, ValueError):
        raise InputError(
            f"{TASK_ID} is set, but {TASK_FIRST} and {TASK_COUNT} are no numbers: give shard_index and num_shards"
        ) from None
    shard, rest = divmod(task - first, max(step, 1))
    if rest or not 0 <= shard < count:
        raise InputError(
            f"{TASK_ID} = {task} of an array of {count} tasks from {first}: tasks must follow each other "
            f"(--array=0-{count - 1}), or give shard_index and num_shards"
        )
    return shard, count

"""Section `checkpoint`: when and how to save, what to keep, where weights come from."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.config.errors import InputError
from megatron_ext.config.section import Count, Name, Positive, Section


@dataclass(frozen=True, kw_only=True)
class SaveConfig(Section, section="checkpoint"):
    """When to save and what to keep, of whatever is trained."""

    save_interval: Count = 1000
    """Optimizer steps between checkpoints; the last step is always saved."""

    keep: Count = 2
    """Newest checkpoints to keep; older ones are removed after a newer one is complete."""

    keep_every: Count | None = None
    """Checkpoints of steps divisible by this are kept for good, beside the newest; null keeps none for good."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(SaveConfig):
    """When and how to save, what to keep, where weights come from."""

    async_save: bool = True
    """Write checkpoints in a process of their own while training goes on; false: training waits for the files."""

    save_timeout_s: Positive = 1800.0
    """Seconds until a checkpoint still being written is given up; the next due step, or the end, tries again."""

    optimizer_format: Literal["fully_reshardable", "dp_reshardable"] = "fully_reshardable"
    """fully_reshardable: opens on any layout, gathered on data rank 0 to save. dp_reshardable: written by every rank
    without gathering, for large runs; opens on the same tensor_model_parallel_size only."""

    init_from: Name | None = None
    """Checkpoint, run or Hugging Face folder whose weights start a new run; ignored once the run has a checkpoint."""

    init_optimizer: bool = False
    """Take the moments of Adam from init_from too (a checkpoint, not a Hugging Face folder); false: weights only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_optimizer and self.init_from is None:
            raise InputError(
                "checkpoint.init_optimizer is true without checkpoint.init_from: name a checkpoint, or set it to false"
            )

"""Section `checkpoint`: when to save, what to keep, where weights come from."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, what to keep, where weights come from."""

    save_interval: int = 1000
    """Optimizer steps between checkpoints; the last step is always saved."""

    keep: int = 2
    """Newest checkpoints to keep; older ones are removed after a newer one is complete."""

    init_from: str | None = None
    """Checkpoint, run or Hugging Face folder whose weights start a new run; ignored once the run has a checkpoint."""

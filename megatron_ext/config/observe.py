"""Section `observe`: the run folder and what is written there."""

from dataclasses import dataclass

from megatron_ext.config.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    """The run folder and what is written there."""

    run_dir: str
    """Folder of config.yaml, metrics.jsonl, events.jsonl, tensorboard/ and checkpoints/; an unfinished run in it is
    resumed."""

    log_interval: int = 10
    """Optimizer steps between console lines; metrics.jsonl has every step."""

    tensorboard: bool = True
    """Write TensorBoard event files."""

    wandb_project: str | None = None
    """Weights & Biases project that also gets the metrics; its own environment variables (WANDB_MODE, WANDB_ENTITY,
    WANDB_API_KEY) hold. Empty: not used, and not needed."""

    profile_step_start: int | None = None
    """First optimizer step to profile; traces go to RUN_DIR/profile/ for chrome://tracing or Perfetto."""

    profile_step_end: int | None = None
    """First optimizer step that is not profiled any more; empty means one step after profile_step_start."""

    profile_ranks: tuple[int, ...] = (0,)
    """Ranks that are profiled."""

    record_memory_history: bool = False
    """On a GPU, also write the allocations of the profiled steps for pytorch.org/memory_viz."""

    def __post_init__(self) -> None:
        if self.log_interval < 1:
            raise InputError(f"observe.log_interval {self.log_interval}: must be at least 1")

"""Section `observe`: the run folder and what is written there."""

from dataclasses import dataclass

from megatron_ext.config.errors import InputError
from megatron_ext.config.section import Count, Name, Number, Section


@dataclass(frozen=True, kw_only=True)
class ObserveConfig(Section, section="observe"):
    """The run folder and what is written there."""

    run_dir: Name
    """Folder of config.yaml, metrics.jsonl, events.jsonl, tensorboard/ and checkpoints/; an unfinished run in it is
    resumed."""

    log_interval: Count = 10
    """Optimizer steps between console lines; metrics.jsonl has every step."""

    tensorboard: bool = True
    """Write TensorBoard event files."""

    wandb_project: Name | None = None
    """Weights & Biases project that also gets the metrics; its own environment variables (WANDB_MODE, WANDB_ENTITY,
    WANDB_API_KEY) hold. Empty: not used, and not needed."""

    profile_step_start: Count | None = None
    """First optimizer step to profile; traces go to RUN_DIR/profile/ for chrome://tracing or Perfetto."""

    profile_step_end: Count | None = None
    """First optimizer step that is not profiled any more; empty means one step after profile_step_start."""

    profile_ranks: tuple[Number, ...] = (0,)
    """Ranks that are profiled."""

    record_memory_history: bool = False
    """On a GPU, also write the allocations of the profiled steps for pytorch.org/memory_viz."""

    def __post_init__(self) -> None:
        super().__post_init__()
        start, end = self.profile_step_start, self.profile_step_end
        if end is not None and (start is None or start >= end):
            raise InputError(
                f"observe.profile_step_start {start} and observe.profile_step_end {end}: give a first step, and an end "
                "after it"
            )
        if self.record_memory_history and start is None:
            raise InputError(
                "observe.record_memory_history is true without observe.profile_step_start: give the first step, or set "
                "it to false"
            )

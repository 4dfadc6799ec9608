"""Section `resilience`: what the run does about bad steps, hangs, slow ranks and silent errors."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.config.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ResilienceConfig:
    """What the run does about bad steps, hangs, slow ranks and silent errors."""

    on_bad_step: Literal["stop", "skip", "rewind"] = "stop"
    """What follows a step whose loss or gradient norm is not finite, or spikes: end the run; leave the weights as they
    are and go on with the next batch; or go back to the last checkpoint and pass over the batch."""

    spike_factor: float | None = None
    """A loss or gradient norm above this many times the median of the last good steps is a spike; null looks for NaN
    and infinities only."""

    spike_window: int = 64
    """Good steps whose median a spike is measured against; until there are so many, nothing counts as a spike."""

    max_bad_steps: int = 10
    """Bad steps of one start that are skipped or rewound; one more ends the run."""

    pass_over_batches: int = 1
    """Global batches that a rewound run leaves out, the bad one the last of them."""

    hang_timeout_s: float = 480.0
    """Seconds that a step, or the start, may take before every rank prints its stack and ends; an evaluation may take
    its steps longer, a save checkpoint.save_timeout_s. 0 never. It must be below runtime.distributed_timeout_s, or the
    collective library ends the run first."""

    slow_step_factor: float | None = None
    """A step that takes so many times the median of the last steps counts as a hang too; null waits hang_timeout_s."""

    replica_check_interval: int = 0
    """Optimizer steps between comparisons of the weights that ranks hold in common, by checksum; 0 never."""

    check_optimizer: bool = False
    """Compare the weights with the optimizer's fp32 master copies as well."""

    rank_times_interval: int = 0
    """Optimizer steps between measurements of every rank's own time for data and computation; 0 never."""

    notify: str | None = None
    """Shell command that the main rank runs when a start ends, with EMU3_RUN_DIR, EMU3_OUTCOME (finished, stopped,
    failed), EMU3_STEP and EMU3_MESSAGE in its environment."""

    def __post_init__(self) -> None:
        for name in ("spike_factor", "slow_step_factor"):
            value = getattr(self, name)
            if value is not None and not value > 1:
                raise InputError(f"resilience.{name} {value}: must be above 1, or null")
        for name in ("spike_window", "pass_over_batches"):
            if getattr(self, name) < 1:
                raise InputError(f"resilience.{name} {getattr(self, name)}: must be at least 1")
        for name in ("max_bad_steps", "hang_timeout_s", "replica_check_interval", "rank_times_interval"):
            if getattr(self, name) < 0:
                raise InputError(f"resilience.{name} {getattr(self, name)}: must not be negative")

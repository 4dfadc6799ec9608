"""Section `resilience`: what the run does about bad steps, hangs, slow ranks and silent errors."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_ext.config.section import Count, Name, NonNegative, Number, Section, above

Factor = Annotated[float, above(1)]
"""How many times the usual value is too much."""


@dataclass(frozen=True, kw_only=True)
class ResilienceConfig(Section, section="resilience"):
    """What the run does about bad steps, hangs, slow ranks and silent errors."""

    on_bad_step: Literal["stop", "skip", "rewind"] = "stop"
    """What follows a step whose loss or gradient norm is not finite, or spikes: end the run; leave the weights as they
    are and go on with the next batch; or go back to the last checkpoint and pass over the batch."""

    spike_factor: Factor | None = None
    """A loss or gradient norm above this many times the median of the last good steps is a spike; null looks for NaN
    and infinities only."""

    spike_window: Count = 64
    """Good steps whose median a spike is measured against; until there are so many, nothing counts as a spike."""

    max_bad_steps: Number = 10
    """Bad steps of one start that are skipped or rewound; one more ends the run."""

    pass_over_batches: Count = 1
    """Global batches that a rewound run leaves out, the bad one the last of them."""

    hang_timeout_s: NonNegative = 480.0
    """Seconds that a step, or the start, may take before every rank prints its stack and ends; an evaluation may take
    its steps longer, a save checkpoint.save_timeout_s. 0 never. It must be below runtime.distributed_timeout_s, or the
    collective library ends the run first."""

    slow_step_factor: Factor | None = None
    """A step that takes so many times the median of the last steps counts as a hang too; null waits hang_timeout_s."""

    replica_check_interval: Number = 0
    """Optimizer steps between comparisons of the weights that ranks hold in common, by checksum; 0 never."""

    check_optimizer: bool = False
    """Compare the weights with the optimizer's fp32 master copies as well."""

    rank_times_interval: Number = 0
    """Optimizer steps between measurements of every rank's own time for data and computation; 0 never."""

    notify: Name | None = None
    """Shell command that the main rank runs when a start ends, with EMU3_RUN_DIR, EMU3_OUTCOME (finished, stopped,
    failed), EMU3_STEP and EMU3_MESSAGE in its environment."""

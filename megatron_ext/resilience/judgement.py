"""Which steps are bad: a loss or gradient norm that is not finite, or far above those of the last good steps."""

import math
import statistics
from collections.abc import Sequence

from megatron_ext.config.resilience import ResilienceConfig

Measured = tuple[float, float]
"""Loss and gradient norm of a step, the same on every rank: so is every judgement of them."""


def fault_of(measured: Measured, good: Sequence[Measured], section: ResilienceConfig) -> str | None:
    """Why a step that measured so must not change the weights; None where it may.

    Args:
        measured: of the step.
        good: of the last good steps, the oldest first.
    """
    for name, value in zip(("loss", "gradient norm"), measured, strict=True):
        if not math.isfinite(value):
            return f"{name} {value}"
    if section.spike_factor is None or len(good) < section.spike_window:
        return None
    for name, value, before in zip(("loss", "gradient norm"), measured, zip(*good, strict=True), strict=True):
        median = statistics.median(before)
        if value > section.spike_factor * median:
            return f"{name} {value:.4g}, more than {section.spike_factor:g} times the median {median:.4g}"
    return None


def remembered(good: Sequence[Measured], measured: Measured, section: ResilienceConfig) -> tuple[Measured, ...]:
    """What to measure the next step against, after a good one."""
    return (*good, measured)[-section.spike_window :] if section.spike_factor is not None else ()

"""Learning rate as a pure function of the step."""

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    peak: float,
    minimum: float,
    warmup_steps: int,
    decay_steps: int,
    style: Literal["cosine", "linear", "constant"],
) -> float:
    """Learning rate of optimizer step `step` (the first is 1).

    Linear warm-up from 0, reached at step `warmup_steps`; then the decay, which is at `minimum` from step
    `decay_steps` on.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if style == "constant":
        return peak
    if step >= decay_steps:
        return minimum
    progress = (step - warmup_steps) / (decay_steps - warmup_steps)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if style == "cosine" else 1 - progress
    return minimum + (peak - minimum) * remaining

"""Section `objective`: what the decoder is trained to do."""

from dataclasses import dataclass
from fractions import Fraction

from megatron_ext.config.errors import InputError
from megatron_ext.config.section import NonNegative, Section

LARGEST_DENOMINATOR = 100
"""Weights are fractions k/n with n up to this, so that their sums are exact integers."""


def as_fraction(weight: float) -> Fraction:
    """k/n of a weight: what weighs so counts k times, what weighs 1 n times."""
    return Fraction(weight).limit_denominator(LARGEST_DENOMINATOR)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Section, section="objective"):
    """What the decoder is trained to do: next-token prediction, weighted by the id of the label."""

    vision_loss_weight: NonNegative = 0.5
    """Weight of a label that is a visual id (Emu3 section 2.4: 0.5); text and structure weigh 1. A fraction k/n, n <=
    100."""

    def __post_init__(self) -> None:
        super().__post_init__()
        nearest = as_fraction(self.vision_loss_weight)
        if abs(float(nearest) - self.vision_loss_weight) > 1e-9:
            raise InputError(
                f"objective.vision_loss_weight {self.vision_loss_weight}: must be a fraction k/n with n <= "
                f"{LARGEST_DENOMINATOR}, such as {float(nearest)} ({nearest})"
            )

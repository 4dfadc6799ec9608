"""Section `objective`: what the decoder is trained to do."""

from dataclasses import dataclass

LARGEST_DENOMINATOR = 100
"""Weights are fractions k/n with n up to this, so that their sums are exact integers."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the decoder is trained to do: next-token prediction, weighted by the id of the label."""

    vision_loss_weight: float = 0.5
    """Weight of a label that is a visual id (Emu3 section 2.4: 0.5); text and structure weigh 1. A fraction k/n, n <=
    100."""

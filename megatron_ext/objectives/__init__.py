"""What the decoder is trained to do."""

from megatron_ext.config.objective import ObjectiveConfig
from megatron_ext.objectives.base import LossSums, Objective
from megatron_ext.objectives.next_token import NextToken
from megatron_ext.vocab import VocabLayout


def build_objective(objective: ObjectiveConfig, layout: VocabLayout) -> Objective:
    """The objective that the section describes."""
    return NextToken(objective, layout)


__all__ = ["LossSums", "NextToken", "Objective", "build_objective"]

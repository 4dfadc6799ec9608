"""What a run will cost, before it runs: parameters, FLOPs, memory per rank, layouts that fit. No torch, no GPU.

`megatron_ext.plan.report.answer` prints it all; it is not imported here, because a decoder needs only its shape.
"""

from megatron_ext.config.model import PRESETS, DecoderShape
from megatron_ext.plan.flops import flops_per_token
from megatron_ext.plan.parameters import Parameters, count_parameters, pad_vocabulary
from megatron_ext.plan.question import Question, take_question

__all__ = [
    "PRESETS",
    "DecoderShape",
    "Parameters",
    "Question",
    "count_parameters",
    "flops_per_token",
    "pad_vocabulary",
    "take_question",
]

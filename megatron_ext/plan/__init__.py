"""What a run will cost, before it runs: parameters, FLOPs, memory per rank, layouts that fit. No torch, no GPU."""

from megatron_ext.plan.flops import flops_per_token
from megatron_ext.plan.shape import PRESETS, DecoderShape, pad_vocabulary

__all__ = ["PRESETS", "DecoderShape", "flops_per_token", "pad_vocabulary"]

"""AdamW, gradient reduction and the learning-rate schedule."""

from megatron_ext.optim.buckets import Bucket, gradient_buckets
from megatron_ext.optim.build import Optimizer, StepResult, build_optimizer
from megatron_ext.optim.schedule import learning_rate

__all__ = ["Bucket", "Optimizer", "StepResult", "build_optimizer", "gradient_buckets", "learning_rate"]

"""AdamW, gradient reduction and the learning-rate schedule."""

from megatron_ext.optim.build import Optimizer, StepResult, build_optimizer
from megatron_ext.optim.schedule import learning_rate

__all__ = ["Optimizer", "StepResult", "build_optimizer", "learning_rate"]

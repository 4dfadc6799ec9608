"""The training loop."""

from megatron_ext.train.initial import resume_or_init
from megatron_ext.train.loop import Trainer
from megatron_ext.train.state import TrainState
from megatron_ext.train.step import MicrobatchRunner

__all__ = ["MicrobatchRunner", "TrainState", "Trainer", "resume_or_init"]

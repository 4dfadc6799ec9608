"""The whole configuration of `pretrain_emu3.py`, one section per room."""

import dataclasses
from dataclasses import dataclass, field
from typing import Self

from megatron_ext.config.checkpoint import CheckpointConfig
from megatron_ext.config.data import DataConfig
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.objective import ObjectiveConfig
from megatron_ext.config.observe import ObserveConfig
from megatron_ext.config.optim import OptimConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.resilience import ResilienceConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.config.section import Section
from megatron_ext.config.train import TrainConfig
from megatron_ext.config.vocab import VocabConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Pretrain an Emu3 decoder by next-token prediction over text, image and video tokens.

    With --dry_run and --world_size N, print what the run needs and takes instead (docs/planning.md); with --suggest,
    layouts that fit. Both take --tokens (to train on, instead of the configuration's steps), --mfu 0.4, and of a GPU
    --memory_gib 80 and --peak_tflops 989.4."""

    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Device, precision and process limits."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the ranks divide the work."""

    vocab: VocabConfig = field(default_factory=VocabConfig)
    """Which ids mean what."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the decoder."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What the decoder is trained to do."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW, clipping and the learning-rate schedule."""

    train: TrainConfig
    """Lengths, batches and stopping."""

    data: DataConfig = field(default_factory=DataConfig)
    """What is trained on."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save and what to keep."""

    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    """What the run does about bad steps, hangs, slow ranks and silent errors."""

    observe: ObserveConfig
    """The run folder and what is written there."""

    def computing_in(self, precision: str) -> Self:
        """This configuration with runtime.precision settled."""
        return dataclasses.replace(self, runtime=dataclasses.replace(self.runtime, precision=precision))

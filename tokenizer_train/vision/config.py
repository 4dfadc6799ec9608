"""Configuration of a vision tokenizer's training."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_ext.config import InputError
from megatron_ext.config.checkpoint import CheckpointConfig
from megatron_ext.config.observe import ObserveConfig
from megatron_ext.config.optim import OptimConfig
from megatron_ext.vision import VisionTokenizerConfig
from tokenizer_train.vision.config_media import MediaConfig


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms of the loss; each term is a mean over all its numbers."""

    l1: float = 1.0
    """Absolute difference of the pixels."""

    l2: float = 1.0
    """Squared difference of the pixels."""

    gradient: float = 0.5
    """Absolute difference of the pixels' differences to their right and lower neighbours: keeps edges."""

    codebook: float = 1.0
    """Squared distance that moves the codes to the latents."""

    commitment: float = 0.25
    """Squared distance that moves the latents to their codes."""


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """What keeps the codebook from collapsing."""

    start_step: int = 0
    """Steps without quantisation, as a plain autoencoder; then k-means places the codes."""

    kmeans_batches: int = 50
    """Batches whose latents k-means groups; 0 leaves the codes where they were initialised, which collapses from
    scratch and is for trained weights."""

    kmeans_iterations: int = 15
    """Rounds of k-means."""

    restart_interval: int = 20
    """Codes that no latent chose in so many steps are moved onto random latents; 0 never."""

    restart_until_step: int = 0
    """Last step with restarts; late ones only add noise."""


@dataclass(frozen=True, kw_only=True)
class VisionTrainConfig:
    """Length, seed and precision of the training."""

    train_steps: int = 1000
    """Optimizer steps."""

    seed: int = 1234
    """Seed of initial weights, order of the media, crops, k-means and restarts."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """Type in which the networks compute; weights, quantiser and losses stay fp32."""

    init: Literal["near_identity", "emu3"] = "near_identity"
    """Initial weights: residual branches at zero and temporal layers that pass frames on, or those of Emu3's code."""

    freeze_batch_norm_step: int = 0
    """Step after which the batch norms use their running statistics, as in use; 0 never."""

    eval_interval: int = 500
    """Steps between evaluations on the training media; one more at the end."""

    eval_samples: int = 64
    """Pictures, and clips, evaluated at most."""

    num_threads: int = 0
    """CPU threads; 0 takes all cores this process may use."""


@dataclass(frozen=True, kw_only=True)
class VisionTokenizerTrainingConfig:
    """Train a vision tokenizer on pictures and clips."""

    media: MediaConfig
    """Which pictures and clips are seen."""

    observe: ObserveConfig
    """The run folder."""

    model: VisionTokenizerConfig = field(default_factory=VisionTokenizerConfig)
    """Shape of the tokenizer."""

    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the loss."""

    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    """What keeps the codebook from collapsing."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW, clipping and the learning-rate schedule."""

    train: VisionTrainConfig = field(default_factory=VisionTrainConfig)
    """Length, seed and precision."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save; init_from is the folder of a vision tokenizer."""

    def __post_init__(self) -> None:
        self.media.check_factors(self.model.spatial_factor, self.model.temporal_downsample_factor)
        if self.train.train_steps < 1:
            raise InputError(f"train.train_steps = {self.train.train_steps}: must be positive")

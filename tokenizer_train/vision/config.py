"""Configuration of a vision tokenizer's training."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_ext.config import InputError
from megatron_ext.config.checkpoint import CheckpointConfig
from megatron_ext.config.observe import ObserveConfig
from megatron_ext.config.optim import OptimConfig
from megatron_ext.vision import VisionTokenizerConfig


@dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """Which pictures and clips are seen, and how a batch is made of them."""

    inputs: list[str]
    """Folders in the layout of img2dataset's "files" output, WebDataset tars, pictures and clips, or glob patterns."""

    input_weights: list[float] = field(default_factory=list)
    """Share of each of inputs in the pictures, and in the clips, relative to the others; empty takes their numbers of
    samples."""

    size: int = 256
    """Side in pixels of the square whose area a picture of the batch has; a multiple of the tokenizer's spatial
    factor."""

    larger_sizes: list[int] = field(default_factory=list)
    """Further sides: a picture goes to the largest one that it fills without being enlarged. A batch holds fewer of
    them, in proportion to the area."""

    aspect_ratios: list[float] = field(default_factory=lambda: [1.0])
    """Width over height of the shapes that batches may have; a picture goes to the nearest."""

    batch_size: int = 8
    """Frames of `size` in a batch over all ranks: as many pictures, or clips worth as many frames."""

    augmented_share: float = 0.25
    """Share of a batch that are random crops, mirrored at times, of clips also random starts and strides. The others
    are the largest centred crop, of clips one piece after the other from the start."""

    smallest_crop: float = 0.5
    """Side of the smallest random crop over the side of the centred one."""

    mirrored_share: float = 0.5
    """Share of the random crops that are mirrored."""

    clip_share: float = 0.0
    """Share of the batches that are made of clips."""

    clip_frames: int = 0
    """Frames of a clip in a batch, a multiple of temporal_downsample_factor; 0 takes that itself, the chunks in which
    clips are tokenized."""

    clip_frame_rate: float | None = None
    """Frames per second at which clips are sampled; null takes each clip's own rate."""

    clip_strides: list[int] = field(default_factory=lambda: [1])
    """Steps from one frame of a clip in a batch to the next, at that rate: random pieces draw one, the others take the
    smallest."""

    clip_max_frames: int = 120
    """Frames of a clip at most, from its start, at that rate."""

    max_bad_fraction: float = 0.01
    """Largest share of the pictures and clips that may turn out to be unusable; they are skipped, more of them stop."""

    index_dir: str | None = None
    """Folder that keeps what was read of the inputs, so that the next start need not: where the bytes of each sample
    are, its size, its frames. Null reads every header at every start."""

    loader: Literal["auto", "cpu", "dali"] = "auto"
    """Who decodes: cpu is OpenCV and PyAV; dali is NVIDIA DALI, on the device that trains; auto takes DALI on a GPU
    where it is installed."""

    workers: int = 2
    """Threads that decode while the trainer computes."""

    prefetch_batches: int = 2
    """Batches decoded ahead."""

    cache_megabytes: int = 512
    """Memory for decoded pictures and clips that come again, in MB; 0 keeps none."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise InputError("media.inputs is empty: give folders or tars of media")
        if self.input_weights and len(self.input_weights) != len(self.inputs):
            raise InputError(
                f"media.input_weights has {len(self.input_weights)} numbers, media.inputs {len(self.inputs)}: "
                "give one for each"
            )
        if any(not weight >= 0 for weight in self.input_weights) or (
            self.input_weights and not sum(self.input_weights)
        ):
            raise InputError(f"media.input_weights = {self.input_weights}: give numbers of at least 0, one above it")
        for name in ("size", "batch_size", "clip_max_frames", "workers"):
            if getattr(self, name) < 1:
                raise InputError(f"media.{name} = {getattr(self, name)}: must be positive")
        for name in ("clip_frames", "prefetch_batches", "cache_megabytes"):
            if getattr(self, name) < 0:
                raise InputError(f"media.{name} = {getattr(self, name)}: must not be negative")
        for name in ("augmented_share", "smallest_crop", "mirrored_share", "clip_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"media.{name} = {getattr(self, name)}: must be between 0 and 1")
        for name in ("aspect_ratios", "clip_strides"):
            values = getattr(self, name)
            if not values or min(values) <= 0:
                raise InputError(f"media.{name} = {values}: give at least one number, all of them positive")
        if any(size <= self.size for size in self.larger_sizes):
            raise InputError(f"media.larger_sizes = {self.larger_sizes}: must all be above media.size = {self.size}")


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
        for name, size in (("size", self.media.size), *(("larger_sizes", size) for size in self.media.larger_sizes)):
            if size % self.model.spatial_factor:
                raise InputError(
                    f"media.{name} = {size}: must be a multiple of the spatial factor {self.model.spatial_factor}"
                )
        chunk_frames = self.model.temporal_downsample_factor
        if self.media.clip_frames % chunk_frames:
            raise InputError(
                f"media.clip_frames = {self.media.clip_frames}: must be a multiple of the temporal factor "
                f"{chunk_frames}"
            )
        if self.media.clip_share and self.media.batch_size < (self.media.clip_frames or chunk_frames):
            raise InputError(
                f"media.batch_size = {self.media.batch_size}: must hold the {self.media.clip_frames or chunk_frames} "
                "frames of one clip when media.clip_share is not 0"
            )
        if self.train.train_steps < 1:
            raise InputError(f"train.train_steps = {self.train.train_steps}: must be positive")

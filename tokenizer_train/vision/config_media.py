"""Section `media`: which pictures and clips are seen, and how a batch is made of them."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_ext.config import InputError
from megatron_ext.config.section import Count, Name, NonNegative, Number, Positive, Section, Share


@dataclass(frozen=True, kw_only=True)
class MediaConfig(Section, section="media"):
    """Which pictures and clips are seen, and how a batch is made of them."""

    inputs: list[Name]
    """Folders in the layout of img2dataset's "files" output, WebDataset tars, pictures and clips, or glob patterns."""

    valid_inputs: list[Name] = field(default_factory=list)
    """Held-out pictures and clips, in the same forms, on which the training is evaluated on its way; empty takes the
    first of inputs, which says how well it has learnt them and nothing about others."""

    input_weights: list[NonNegative] = field(default_factory=list)
    """Share of each of inputs in the pictures, and in the clips, relative to the others; empty takes their numbers of
    samples."""

    size: Count = 256
    """Side in pixels of the square whose area a picture of the batch has; a multiple of the tokenizer's spatial
    factor."""

    larger_sizes: list[Count] = field(default_factory=list)
    """Further sides: a picture goes to the largest one that it fills without being enlarged. A batch holds fewer of
    them, in proportion to the area."""

    aspect_ratios: list[Positive] = field(default_factory=lambda: [1.0])
    """Width over height of the shapes that batches may have; a picture goes to the nearest."""

    batch_size: Count = 8
    """Frames of `size` in a batch over all ranks: as many pictures, or clips worth as many frames."""

    augmented_share: Share = 0.25
    """Share of a batch that are random crops, mirrored at times, of clips also random starts and strides. The others
    are the largest centred crop, of clips one piece after the other from the start."""

    smallest_crop: Share = 0.5
    """Side of the smallest random crop over the side of the centred one."""

    mirrored_share: Share = 0.5
    """Share of the random crops that are mirrored."""

    clip_share: Share = 0.0
    """Share of the batches that are made of clips."""

    clip_frames: Number = 0
    """Frames of a clip in a batch, a multiple of temporal_downsample_factor; 0 takes that itself, the chunks in which
    clips are tokenized."""

    clip_frame_rate: Positive | None = None
    """Frames per second at which clips are sampled; null takes each clip's own rate."""

    clip_strides: list[Count] = field(default_factory=lambda: [1])
    """Steps from one frame of a clip in a batch to the next, at that rate: random pieces draw one, the others take the
    smallest."""

    clip_max_frames: Count = 120
    """Frames of a clip at most, from its start, at that rate."""

    max_bad_fraction: Share = 0.01
    """Largest share of the pictures and clips that may turn out to be unusable; they are skipped, more of them stop."""

    allow_change: bool = False
    """Whether a run may go on with other media than its checkpoint was made with: from there in the order of the new
    ones. Also permits other inputs and input_weights."""

    index_dir: Name | None = None
    """Folder that keeps what was read of the inputs, so that the next start need not: where the bytes of each sample
    are, its size, its frames. Null reads every header at every start."""

    loader: Literal["auto", "cpu", "dali"] = "auto"
    """Who decodes: cpu is OpenCV and PyAV; dali is NVIDIA DALI, on the device that trains; auto takes DALI on a GPU
    where it is installed."""

    workers: Count = 2
    """Threads that decode while the trainer computes."""

    prefetch_batches: Number = 2
    """Batches decoded ahead."""

    cache_megabytes: Number = 512
    """Memory for decoded pictures and clips that come again, in MB; 0 keeps none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inputs:
            raise InputError("media.inputs is empty: give folders or tars of media")
        if self.input_weights and len(self.input_weights) != len(self.inputs):
            raise InputError(
                f"media.input_weights has {len(self.input_weights)} numbers, media.inputs {len(self.inputs)}: "
                "give one for each"
            )
        if self.input_weights and not sum(self.input_weights):
            raise InputError(f"media.input_weights = {self.input_weights}: at least one must be above 0")
        for name in ("aspect_ratios", "clip_strides"):
            if not getattr(self, name):
                raise InputError(f"media.{name} is empty: give at least one number")
        if any(size <= self.size for size in self.larger_sizes):
            raise InputError(f"media.larger_sizes = {self.larger_sizes}: must all be above media.size = {self.size}")

    def check_factors(self, spatial_factor: int, temporal_factor: int) -> None:
        """Refuse sizes and clips that a tokenizer of these factors cannot take.

        Raises:
            InputError: naming the field.
        """
        for name, size in (("size", self.size), *(("larger_sizes", size) for size in self.larger_sizes)):
            if size % spatial_factor:
                raise InputError(f"media.{name} = {size}: must be a multiple of the spatial factor {spatial_factor}")
        if self.clip_frames % temporal_factor:
            raise InputError(
                f"media.clip_frames = {self.clip_frames}: must be a multiple of the temporal factor {temporal_factor}"
            )
        frames = self.clip_frames or temporal_factor
        if self.clip_share and self.batch_size < frames:
            raise InputError(
                f"media.batch_size = {self.batch_size}: must hold the {frames} frames of one clip when "
                "media.clip_share is not 0"
            )

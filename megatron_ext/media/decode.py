"""From a sample to the pixels that a vision tokenizer takes: read, decoded, brought to size.

Shapes: T frames, H W pixels, C colour channels.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_ext.config.section import Count, Positive, Section
from megatron_ext.media.clips import decode_clip
from megatron_ext.media.pictures import open_picture
from megatron_ext.media.resize import ResizeConfig, resize
from megatron_ext.media.samples import Sample


@dataclass(frozen=True, kw_only=True)
class ClipConfig(Section, section="clips"):
    """Which frames of a clip are encoded."""

    frame_rate: Positive | None = None
    """Frames per second; null takes the clip's own rate."""

    max_frames: Count = 120
    """Frames of a clip at most, from its start; the rest is cut down to a multiple of the temporal factor."""


@dataclass(frozen=True, kw_only=True)
class DecodedSample:
    """A sample as pixels of their final size."""

    sample: Sample
    frames: np.ndarray
    """Uint8 [H, W, C] of a picture, [T, H, W, C] of a clip."""

    captions: tuple[str, ...]
    sha256: str
    """Of the encoded picture or clip."""

    clip_fields: dict[str, int]
    """frame_rate_mhz and duration_ms of a clip; empty for a picture."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Decodes samples for one tokenizer; small enough to be sent to other processes."""

    resize: ResizeConfig
    clips: ClipConfig
    spatial_factor: int
    """Sides are multiples of it."""

    temporal_factor: int
    """The number of a clip's frames is a multiple of it."""

    def __call__(self, sample: Sample) -> DecodedSample:
        """Read, decode and resize.

        Raises:
            MediaError: the sample cannot be used.
        """
        data = sample.media.read()
        clip_fields = {}
        if sample.kind == "image":
            frames = self._fit(open_picture(data))
        else:
            clip = decode_clip(
                data,
                frame_rate=self.clips.frame_rate,
                max_frames=self.clips.max_frames,
                multiple=self.temporal_factor,
                resize=self._fit,
            )
            frames = clip.frames_THWC
            clip_fields = {"frame_rate_mhz": clip.frame_rate_mhz, "duration_ms": clip.duration_ms}
        return DecodedSample(
            sample=sample,
            frames=frames,
            captions=sample.captions(),
            sha256=hashlib.sha256(data).hexdigest(),
            clip_fields=clip_fields,
        )

    def _fit(self, frame: np.ndarray | Image.Image) -> np.ndarray:
        return resize(frame, self.resize, self.spatial_factor)

"""Samples of media to codes, in batches of equal size.

Shapes: T frames, H W pixels, C colour channels.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from megatron_ext.config import InputError
from megatron_ext.media import MediaError, ResizeConfig, Sample, decode_clip, decode_picture, readable_name, resize
from megatron_ext.vision.movqgan import MoVQGAN
from megatron_ext.vision.pixels import from_uint8
from megatron_ext.vision.shards import TokenizedSample

MAX_WAITING_BYTES = 1 << 30
"""Pixels that may wait for others of their shape; past it the largest batch is encoded as it is."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Which frames of a clip are encoded."""

    frame_rate: float | None = None
    """Frames per second; null takes the clip's own rate."""

    max_frames: int = 120
    """Frames of a clip at most, from its start; the rest is cut down to a multiple of the temporal factor."""

    def __post_init__(self) -> None:
        if self.max_frames < 1 or (self.frame_rate is not None and self.frame_rate <= 0):
            raise InputError(
                f"clips: frame_rate = {self.frame_rate}, max_frames = {self.max_frames}: both must be positive"
            )


@dataclass(frozen=True, kw_only=True)
class DecodedSample:
    """A sample as pixels of its final size."""

    sample: Sample
    frames: np.ndarray
    """Uint8 [H, W, C] of a picture, [T, H, W, C] of a clip."""

    captions: tuple[str, ...]
    sha256: str
    clip_fields: dict[str, int]
    """frame_rate_mhz and duration_ms of a clip; empty for a picture."""


def decode_sample(sample: Sample, model: MoVQGAN, resizing: ResizeConfig, clips: ClipConfig) -> DecodedSample:
    """Read, decode and resize a sample to what `model` takes.

    Raises:
        MediaError: the sample cannot be used.
    """
    if readable_name(sample.source) != sample.source:
        raise MediaError("its name is not UTF-8, which shards and datasets hold keys in: rename it")
    data = sample.media.read()

    def fit(frame_HWC: np.ndarray) -> np.ndarray:
        return resize(frame_HWC, resizing, model.config.spatial_factor)

    clip_fields = {}
    if sample.kind == "image":
        frames = fit(decode_picture(data))
    else:
        clip = decode_clip(
            data,
            frame_rate=clips.frame_rate,
            max_frames=clips.max_frames,
            multiple=model.config.temporal_downsample_factor,
            resize=fit,
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


def tokenize(
    samples: Iterable[Sample],
    model: MoVQGAN,
    decode: Callable[[Sample], DecodedSample],
    *,
    batch_size: int,
    advance: Callable[[int], None],
) -> tuple[list[TokenizedSample], list[dict[str, str]]]:
    """Codes of the samples in their order, and key, source and reason of those that cannot be used.

    Samples wait until `batch_size` of one shape are there, or MAX_WAITING_BYTES in all; `advance` is told how many
    are done.
    """
    tokenized: dict[str, TokenizedSample] = {}
    skipped = []
    waiting: dict[tuple[int, ...], list[DecodedSample]] = {}
    order = []

    def encode(shape: tuple[int, ...]) -> None:
        batch = waiting.pop(shape)
        tokenized.update(_encode(batch, model))
        advance(len(batch))

    def waiting_bytes(shape: tuple[int, ...]) -> int:
        return len(waiting[shape]) * math.prod(shape)

    for sample in samples:
        order.append(sample.key)
        try:
            decoded = decode(sample)
        except MediaError as error:
            names = {"key": readable_name(sample.key), "source": readable_name(sample.source)}
            skipped.append({**names, "reason": str(error)})
            advance(1)
            continue
        shape = decoded.frames.shape
        waiting.setdefault(shape, []).append(decoded)
        if len(waiting[shape]) == batch_size:
            encode(shape)
        elif sum(map(waiting_bytes, waiting)) > MAX_WAITING_BYTES:
            encode(max(waiting, key=waiting_bytes))
    for shape in list(waiting):
        encode(shape)
    return [tokenized[key] for key in order if key in tokenized], skipped


def _encode(batch: list[DecodedSample], model: MoVQGAN) -> dict[str, TokenizedSample]:
    device = next(model.parameters()).device
    frames = np.stack([decoded.frames for decoded in batch])
    pixels = from_uint8(frames).to(device)
    with torch.inference_mode():
        codes = (model.encode(pixels) if pixels.ndim == 4 else model.encode_chunks(pixels)).cpu().numpy()
    return {
        decoded.sample.key: TokenizedSample(
            key=decoded.sample.key,
            kind=decoded.sample.kind,
            codes=sample_codes,
            captions=decoded.captions,
            source=decoded.sample.source,
            source_sha256=decoded.sha256,
            **decoded.clip_fields,
        )
        for decoded, sample_codes in zip(batch, codes, strict=True)
    }

"""What is measured of a picture by the process that decodes it.

Shapes: H W pixels, C colour channels.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image

from megatron_ext.curate.colour import colour_spread
from megatron_ext.curate.hashes import perceptual_hash, pixels_digest
from megatron_ext.curate.picture_filters import PictureFiltersConfig, judge_resolution
from megatron_ext.curate.text import text_share
from megatron_ext.media import MediaError, Sample, decode_picture, readable_name

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A decoded picture, without its pixels. What a filter before it makes needless is None."""

    height: int
    width: int
    captions: tuple[str, ...]
    sha256: str
    """Of the file."""

    pixels: str | None = None
    """`pixels_digest`."""

    phash: int | None = None
    """`perceptual_hash`."""

    colour: float | None = None
    """`colour_spread`."""

    square_HWC: np.ndarray | None = None
    """`clip_square`, where an aesthetic score is wanted."""


def measure(sample: Sample, filters: PictureFiltersConfig, clip_side: int | None) -> Measured:
    """Decode a picture and measure what needs no network; `clip_side` None: no aesthetic score is wanted.

    Raises:
        MediaError: it cannot be used.
    """
    if readable_name(str(sample.media.path)) != str(sample.media.path):
        raise MediaError("its name is not UTF-8, which tables cannot hold: rename it")
    data = sample.media.read()
    picture_HWC = decode_picture(data)
    height, width = picture_HWC.shape[:2]
    known = {"height": height, "width": width, "captions": sample.captions()}
    known["sha256"] = hashlib.sha256(data).hexdigest()
    if not judge_resolution(height, width, filters).passed:
        return Measured(**known)
    return Measured(
        **known,
        pixels=pixels_digest(picture_HWC),
        phash=perceptual_hash(picture_HWC),
        colour=colour_spread(picture_HWC),
        square_HWC=None if clip_side is None else clip_square(picture_HWC, clip_side),
    )


def measure_text(sample: Sample, shorter_edge: int) -> float:
    """`text_share` of a picture, decoded again: between the two its aesthetic score is waited for.

    Raises:
        MediaError: the picture cannot be used any more.
    """
    return text_share(decode_picture(sample.media.read()), shorter_edge)


def call(task: Callable[[], Result]) -> Result:
    """What the processes do: one picture and one thread each."""
    cv2.setNumThreads(1)
    return task()


def clip_square(picture_HWC: np.ndarray, side: int) -> np.ndarray:
    """What CLIP looks at: the uint8 picture with its shorter edge at `side` (bicubic), its middle cut out.

    Source: github.com/openai/CLIP, clip/clip.py, `_transform`; the longer edge loses its fraction, as torchvision's
    Resize does.
    """
    height, width = picture_HWC.shape[:2]
    shorter = min(height, width)
    new_height, new_width = int(side * height / shorter), int(side * width / shorter)
    resized = Image.fromarray(picture_HWC).resize((new_width, new_height), Image.Resampling.BICUBIC)
    top, left = (new_height - side) // 2, (new_width - side) // 2
    return np.asarray(resized)[top : top + side, left : left + side]

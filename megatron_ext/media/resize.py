"""Resize rules: a fixed square, or with the aspect ratio kept a fixed area or bounds on it, as in the paper.

Shapes: H W pixels, C colour channels.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from megatron_ext.config import InputError
from megatron_ext.config.section import Count, Section
from megatron_ext.media.errors import MediaError

MAX_ASPECT_RATIO = 5  # upstream image_processing_emu3visionvq.py:53-144


@dataclass(frozen=True, kw_only=True)
class ResizeConfig(Section, section="resize"):
    """To which size pictures and frames are brought before they are encoded."""

    rule: Literal["area", "target", "square"] = "area"
    """area: keep the aspect ratio, round both sides to the spatial factor, keep the area within min_pixels and
    max_pixels (Emu3's understanding data); target: keep the aspect ratio, bring every area to about size x size (its
    pretraining with 512, its quality fine-tuning with 720); square: the largest centred square, brought to
    size x size."""

    size: Count = 512
    """Side of the square in pixels, rules target and square only."""

    min_pixels: Count = 512 * 512
    """Smaller pictures are enlarged to at least this area, rule area only."""

    max_pixels: Count = 1024 * 1024
    """Larger pictures are reduced to at most this area, rule area only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_pixels > self.max_pixels:
            raise InputError(
                f"resize.min_pixels {self.min_pixels} is above resize.max_pixels {self.max_pixels}: change one of them"
            )


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width as multiples of `factor` whose area is within the bounds, the aspect ratio nearly kept.

    Source: upstream image_processing_emu3visionvq.py:53-144.

    Raises:
        MediaError: a side below `factor`, or one side more than 5 times the other.
    """
    _check_sides(height, width, factor)
    new_height, new_width = (round(side / factor) * factor for side in (height, width))
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height, new_width = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height, new_width = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return new_height, new_width


def target_size(height: int, width: int, *, factor: int, size: int) -> tuple[int, int]:
    """Height and width as the multiples of `factor` nearest to the same shape with the area of `size` x `size`.

    It is the grid that a prompt asks for by an aspect ratio, so that generation meets what training saw.
    Source: upstream emu3/mllm/processing_emu3.py:254-261.

    Raises:
        MediaError: as `smart_resize`.
    """
    _check_sides(height, width, factor)
    scale = size / math.sqrt(height * width) / factor
    new_height, new_width = (max(1, round(side * scale)) * factor for side in (height, width))
    return new_height, new_width


def _check_sides(height: int, width: int, factor: int) -> None:
    if min(height, width) < factor:
        raise MediaError(f"{height}x{width} pixels: each side must have at least {factor}")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise MediaError(f"{height}x{width} pixels: one side is more than {MAX_ASPECT_RATIO} times the other")


def resize(picture: np.ndarray | Image.Image, config: ResizeConfig, factor: int) -> np.ndarray:
    """The picture, uint8 [H, W, C] or in mode RGB, brought to the size `config` says, bicubic; sides are multiples of
    `factor`.

    Raises:
        MediaError: rule area or target, and the picture is too small or too elongated.
    """
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    width, height = image.size
    if config.rule == "square":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = image.crop((left, top, left + side, top + side))
        target = (config.size, config.size)
    elif config.rule == "target":
        target = target_size(height, width, factor=factor, size=config.size)
    else:
        target = smart_resize(height, width, factor=factor, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    if image.size != target[::-1]:
        image = image.resize(target[::-1], Image.Resampling.BICUBIC)
    return np.array(image)

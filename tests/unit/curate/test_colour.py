"""Monochrome pictures of any tint and colour photographs lie on two sides of the threshold."""

from pathlib import Path

import numpy as np
import pytest

from megatron_ext.curate.colour import colour_spread
from megatron_ext.curate.picture_filters import PictureFiltersConfig
from megatron_ext.media import decode_picture

PHOTOGRAPHS = sorted((Path(__file__).parents[3] / "examples" / "media" / "images").glob("*.jpg"))
THRESHOLD = PictureFiltersConfig().min_colour


def tinted(picture_HWC: np.ndarray, dark: tuple, light: tuple) -> np.ndarray:
    share_HW1 = picture_HWC.mean(axis=2, keepdims=True) / 255
    return np.round((1 - share_HW1) * np.array(dark) + share_HW1 * np.array(light)).astype(np.uint8)


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.stem)
def test_photographs(path):
    picture_HWC = decode_picture(path.read_bytes())
    # The smallest of the coloured ones: pisa 3.14; cameraman is a grey one, 0.02.
    assert (colour_spread(picture_HWC) >= THRESHOLD) == (path.stem != "cameraman")
    for dark, light in (((0, 0, 0), (255, 230, 173)), ((10, 10, 120), (255, 204, 128)), ((0, 0, 0), (77, 128, 255))):
        assert colour_spread(tinted(picture_HWC, dark, light)) < 2.5  # measured: up to 1.61


def test_grey_has_none():
    grey = np.random.default_rng(0).integers(0, 256, (64, 80, 1), dtype=np.uint8).repeat(3, axis=2)
    assert colour_spread(grey) < 0.05  # measured: 0.02, OpenCV's rounding of a* and b*


def test_two_colours_of_one_lightness():
    """L*a*b* of sRGB (255, 0, 0) is (53.24, 80.09, 67.20); the grey of its lightness is (127, 127, 127)."""
    picture = np.full((40, 40, 3), (255, 0, 0), dtype=np.uint8)
    assert colour_spread(picture) < 1e-4
    picture[:, 20:] = 127
    half = np.hypot(80.09, 67.20) / 2
    assert colour_spread(picture) == pytest.approx(half, abs=0.1)  # measured: 0.003

"""Resize rules."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.emu3.image_processing_emu3 import smart_resize as transformers_smart_resize

from megatron_ext.config import InputError
from megatron_ext.media import MediaError, ResizeConfig, resize, smart_resize
from megatron_ext.media.resize import target_size

BOUNDS = [(65536, 262144), (262144, 1048576), (518400, 518400)]


@given(st.integers(8, 4000), st.integers(8, 4000), st.sampled_from(BOUNDS))
def test_area_rule_equals_transformers(height, width, bounds):
    low, high = bounds
    if max(height, width) > 5 * min(height, width):
        with pytest.raises(MediaError, match="5 times"):
            smart_resize(height, width, factor=8, min_pixels=low, max_pixels=high)
        return
    size = smart_resize(height, width, factor=8, min_pixels=low, max_pixels=high)
    assert size == transformers_smart_resize(height, width, 8, low, high)


def test_emu3s_bounds():
    def size(height, width):
        return smart_resize(height, width, factor=8, min_pixels=512 * 512, max_pixels=1024 * 1024)

    assert size(720, 720) == (720, 720)
    assert size(1080, 1920) == (768, 1360)
    assert size(256, 256) == (512, 512)
    with pytest.raises(MediaError, match="at least 8"):
        size(7, 20)


def test_area_rule_keeps_the_ratio_and_the_factor():
    picture = np.zeros((100, 150, 3), np.uint8)
    resized = resize(picture, ResizeConfig(rule="area", min_pixels=64 * 96, max_pixels=64 * 96), factor=4)
    assert resized.shape == (64, 96, 3)


def test_square_rule_takes_the_centre():
    picture = np.zeros((4, 12, 3), np.uint8)
    picture[:, 4:8] = 200
    assert (resize(picture, ResizeConfig(rule="square", size=4), factor=4) == 200).all()
    assert (resize(picture, ResizeConfig(rule="square", size=8), factor=4) == 200).all()


@pytest.mark.parametrize("values", [{"size": 0}, {"min_pixels": 10, "max_pixels": 9}])
def test_impossible_rules_are_refused(values):
    with pytest.raises(InputError):
        ResizeConfig(**values)


@pytest.mark.parametrize(
    ("height", "width", "size", "grid"),
    [
        (512, 512, 512, (64, 64)),  # emu3_facts: 64 x 64 codes of a square at 512, 90 x 90 at 720
        (3000, 3000, 720, (90, 90)),
        (300, 400, 512, (55, 74)),  # upstream's grid for 4:3, enlarged or not
        (1200, 1600, 512, (55, 74)),
        (1080, 1920, 720, (68, 120)),
        (100, 500, 512, (29, 143)),
    ],
)
def test_target_is_the_nearest_grid_of_the_area(height, width, size, grid):
    found = target_size(height, width, factor=8, size=size)
    assert found == (grid[0] * 8, grid[1] * 8)
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    assert resize(picture, ResizeConfig(rule="target", size=size), 8).shape[:2] == found


def test_target_refuses_what_the_paper_refuses():
    with pytest.raises(MediaError, match="more than 5 times"):
        target_size(100, 501, factor=8, size=512)
    with pytest.raises(MediaError, match="at least 8"):
        target_size(7, 20, factor=8, size=512)

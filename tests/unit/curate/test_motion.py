"""Motion against displacements that are known."""

import math

import cv2
import numpy as np
import pytest

from megatron_ext.curate.motion import motion
from megatron_ext.media import decode_picture
from tests.unit.curate.films import CLIPS, shot


def pan(across: int, down: int, frames: int = 2) -> np.ndarray:
    """A window of 256 x 384 that moves over a photograph by so many pixels per frame."""
    photo = decode_picture((CLIPS.parent / "images" / "bison.jpg").read_bytes())
    photo = cv2.resize(photo, (768, 512), interpolation=cv2.INTER_CUBIC)
    return np.stack([photo[20 + down * t :, 20 + across * t :][:256, :384] for t in range(frames)])


# Deviations measured: dis 9.5 % at 1 pixel, 0.9 % beyond; farneback 3.6 to 5.9 %.
@pytest.mark.parametrize(
    ("method", "across", "down", "tolerance"),
    [("dis", 1, 0, 0.15), ("dis", 3, 4, 0.02), ("dis", 6, -8, 0.02), ("dis", 12, 16, 0.02), ("dis", 30, 40, 0.02)]
    + [("farneback", across, down, 0.1) for across, down in ((1, 0), (3, 4), (6, -8), (12, 16))],
)
def test_a_pan_measures_its_displacement(method, across, down, tolerance):
    frames = pan(across, abs(down))
    frames = frames[::-1] if down < 0 else frames  # the other way round is as far
    assert motion(frames, method) == pytest.approx(math.hypot(across, down) / 256, rel=tolerance)


def test_it_is_a_mean_over_pairs_in_shorter_edges():
    still, moving = pan(0, 0), pan(8, 0)
    assert motion(still) == 0
    frames = np.concatenate([still, moving])  # of three pairs one moves by 8 pixels
    assert motion(frames) == pytest.approx(8 / 3 / 256, rel=0.05)  # measured: 0.4 %
    half = np.stack([cv2.resize(frame, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for frame in moving])
    assert motion(half) == pytest.approx(motion(moving), rel=0.05), "independent of the size"  # measured: 1 %


def test_one_frame_has_no_motion():
    assert math.isnan(motion(pan(0, 0)[:1]))


def test_real_clips_are_within_the_bounds():
    assert 0.01 < motion(shot("rabbit")[::12]) < 0.05 and 0.01 < motion(shot("tree_hand")[::4]) < 0.05

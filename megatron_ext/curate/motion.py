"""How much moves in a clip: mean optical flow between neighbouring frames, in shorter edges.

Emu3 takes frames at 2 per second with a shorter edge of 256 pixels, divides the mean magnitude of their flow by the
shorter edge and drops clips outside a range (paper, section 2.1); flow network and range are its own, the range
unpublished. Here the flow is OpenCV's: at that size dense inverse search follows displacements up to 50 pixels within
2 %, Farneback's method up to 20 within 6 % (tests/unit/curate/test_motion.py).

Shapes: T frames, H W pixels, C colour channels.
"""

import itertools
import math
from typing import Literal

import cv2
import numpy as np

FlowMethod = Literal["dis", "farneback"]
"""OpenCV's dense inverse search (Kroeger et al., ECCV 2016), or Farneback's polynomial expansion (SCIA 2003)."""


def motion(frames_THWC: np.ndarray, method: FlowMethod = "dis") -> float:
    """Mean magnitude of the optical flow over pixels and neighbouring frames, divided by the shorter edge.

    `frames_THWC` are RGB uint8. Of fewer than two frames it is NaN.
    """
    if len(frames_THWC) < 2:
        return math.nan
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames_THWC]
    flow_of = _flow(method)
    means = [np.linalg.norm(flow_of(first, second), axis=-1).mean() for first, second in itertools.pairwise(grey)]
    return float(np.mean(means)) / min(frames_THWC.shape[1:3])


def _flow(method: FlowMethod):
    """A function of two grey pictures [H, W]: the displacement of each pixel of the first, [H, W, 2]."""
    if method == "farneback":
        # Pyramid, window and neighbourhood are those of OpenCV's own sample (samples/python/opt_flow.py), with levels
        # enough for displacements of a third of the picture.
        options = dict(pyr_scale=0.5, levels=5, winsize=15, iterations=3, poly_n=5, poly_sigma=1.2, flags=0)
        return lambda first, second: cv2.calcOpticalFlowFarneback(first, second, None, **options)
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    return lambda first, second: search.calc(first, second, None)

"""How colourful a picture is.

Shapes: H W pixels, C colour channels, P pixels in a row.
"""

import cv2
import numpy as np

SHORTER_EDGE = 128
"""Pixels to which pictures are reduced first: errors of JPEG's chroma average out."""

LIGHTNESS_STEPS = 32
"""Intervals of L* within which colours are compared."""


def colour_spread(picture_HWC: np.ndarray) -> float:
    """How far the colours of equal lightness lie apart: root mean square distance of (a*, b*) from the mean (a*, b*)
    of pixels in the same one of 32 intervals of L* (CIE 1976 L*a*b*); 0 for shades of grey.

    A picture is monochrome when its lightness says its colour. So a sepia photograph, a blueprint or ink on yellowed
    paper is, whatever the tint, and a dark photograph with little colour is not.
    """
    lab_HWC = cv2.cvtColor(reduced(picture_HWC, SHORTER_EDGE).astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    lightness_P, *chroma_P = lab_HWC.reshape(-1, 3).T.astype(np.float64)
    step_P = np.minimum((lightness_P * (LIGHTNESS_STEPS / 100)).astype(np.int64), LIGHTNESS_STEPS - 1)
    pixels = np.maximum(np.bincount(step_P, minlength=LIGHTNESS_STEPS), 1)
    square = 0.0
    for values_P in chroma_P:
        means = np.bincount(step_P, values_P, LIGHTNESS_STEPS) / pixels
        square += float(np.mean((values_P - means[step_P]) ** 2))
    return square**0.5


def reduced(picture_HWC: np.ndarray, shorter_edge: int) -> np.ndarray:
    """The picture by area averaging with its shorter edge at `shorter_edge`; as it is where it is not larger."""
    height, width = picture_HWC.shape[:2]
    if min(height, width) <= shorter_edge:
        return picture_HWC
    scale = shorter_edge / min(height, width)
    size = (round(width * scale), round(height * scale))
    return cv2.resize(picture_HWC, size, interpolation=cv2.INTER_AREA)

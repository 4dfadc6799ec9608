"""Fingerprints of pictures: of their pixels, and of what they look like.

Shapes: H W pixels, C colour channels.
"""

import functools
import hashlib

import cv2
import numpy as np

SIDE = 32
"""Pixels of the square that a perceptual hash looks at, and `LOW` frequencies of each direction (Zauner 2010,
"Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1)."""

LOW = 8

FLAT = 2.0
"""Standard deviation of the square's grey levels (0 to 255) below which its hash would be rounding errors."""


def pixels_digest(picture_HWC: np.ndarray) -> str:
    """128 bits in hexadecimal of the shape and the pixels: equal for the same pixels in another lossless file."""
    digest = hashlib.blake2b(repr(picture_HWC.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(picture_HWC))
    return digest.hexdigest()


def perceptual_hash(picture_HWC: np.ndarray) -> int | None:
    """64 bits that scaling, compression and small changes of brightness hardly move: is each of the 8 x 8 lowest
    frequencies of the grey picture (cosine transform of 32 x 32 pixels, the constant ones left out) above their median?

    None for a picture without structure.
    """
    grey_HW = cv2.cvtColor(picture_HWC, cv2.COLOR_RGB2GRAY).astype(np.float32)
    square_HW = cv2.resize(grey_HW, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float64)
    if square_HW.std() < FLAT:
        return None
    cosines = _cosines()
    low_HW = cosines @ square_HW @ cosines.T
    bits = (low_HW > np.median(low_HW)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@functools.cache
def _cosines() -> np.ndarray:
    """[LOW, SIDE]: rows 1 to LOW of the discrete cosine transform (type II), unnormalised."""
    frequency, place = np.arange(1, LOW + 1)[:, None], np.arange(SIDE)[None]
    return np.cos(np.pi / SIDE * (place + 0.5) * frequency)

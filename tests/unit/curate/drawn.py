"""Pictures made for the tests of filters."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def clouds(seed: int, height: int = 96, width: int = 96) -> np.ndarray:
    """[H, W, 3] uint8: soft random colours; pictures of different seeds look different."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def lines(count: int, side: int = 512) -> np.ndarray:
    """Lines of text in black on white."""
    page = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(page)
    for line in range(count):
        text = f"The quick brown fox jumps {line}"
        draw.text((20, 20 + 32 * line), text, fill="black", font=ImageFont.load_default(24))
    return np.asarray(page)


def encoded(picture_HWC: np.ndarray, format: str = "PNG", **options) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    Image.fromarray(picture_HWC).save(buffer, format=format, **options)
    return buffer.getvalue()

"""Decoding of pictures: every mode becomes upright RGB, nothing damaged or oversized gets through."""

import io

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from megatron_ext.media import MediaError, decode_picture, pictures


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GRADIENT = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_are_exact(kind):
    decoded = decode_picture(encoded(Image.fromarray(GRADIENT), kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert decoded.dtype == np.uint8 and decoded.flags.writeable and np.array_equal(decoded, GRADIENT)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn counter-clockwise
    picture = Image.new("RGB", (16, 8), "red")
    assert decode_picture(encoded(picture, "JPEG", exif=exif)).shape == (16, 8, 3)


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 255))
    assert decode_picture(encoded(image)).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    palette = Image.new("P", (1, 1))
    assert decode_picture(encoded(palette, "GIF", transparency=0)).tolist() == [[[255, 255, 255]]]


def test_grey_cmyk_and_16_bit():
    assert decode_picture(encoded(Image.new("L", (1, 1), 7))).tolist() == [[[7, 7, 7]]]
    assert decode_picture(encoded(Image.new("CMYK", (8, 8)), "JPEG")).min() > 250
    deep = Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16))
    assert decode_picture(encoded(deep))[0, :, 0].tolist() == [0, 0x80, 0xFF]


@pytest.mark.parametrize("data", [b"", b"not a picture", encoded(Image.fromarray(GRADIENT))[:50]])
def test_damage_is_a_media_error(data):
    with pytest.raises(MediaError, match="not a readable picture"):
        decode_picture(data)


def test_every_truncation_is_refused_or_whole():
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)), "JPEG")
    for length in range(0, len(data), 23):
        with pytest.raises(MediaError):
            decode_picture(data[:length])


def test_size_is_checked_before_the_pixels_are_decoded(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 40)
    with pytest.raises(MediaError, match="6x8 pixels: more than 40"):
        decode_picture(encoded(Image.fromarray(GRADIENT)))


def test_formats_outside_the_list_are_refused():
    with pytest.raises(MediaError):
        decode_picture(encoded(Image.fromarray(GRADIENT), "PPM"))


@pytest.mark.parametrize("size, is_read", [(2 << 20, True), (65 << 20, False)])
def test_a_png_may_hold_long_texts_and_large_profiles(size, is_read):
    texts = PngInfo()
    texts.add_text("history", "x" * size, zip=True)
    data = encoded(Image.fromarray(GRADIENT), pnginfo=texts, icc_profile=bytes(min(size, 4 << 20)))
    if is_read:
        assert (decode_picture(data) == GRADIENT).all()
    else:
        with pytest.raises(MediaError, match="too large"):
            decode_picture(data)


def test_an_avif_is_a_picture():
    decoded = decode_picture(encoded(Image.new("RGB", (32, 24), (200, 40, 60)), "AVIF", quality=100))
    assert decoded.shape == (24, 32, 3) and np.abs(decoded[12, 16].astype(int) - (200, 40, 60)).max() <= 3

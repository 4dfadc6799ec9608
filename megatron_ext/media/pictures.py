"""Safe decoding of pictures from untrusted bytes."""

import io

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from megatron_ext.config import reason_of
from megatron_ext.media.errors import MediaError

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")
MAX_PIXELS = 100_000_000  # a few kilobytes can claim gigapixels; the largest photographs have about this many

# Editors write their history into a PNG, and presses profiles of megabytes. Pillow bounds such a chunk by 1 MiB and all
# of a file together by 64 MiB, which no small file may claim here either.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def decode_picture(data: bytes) -> np.ndarray:
    """The picture as uint8 [H, W, 3]; the rest as `open_picture`."""
    return np.array(open_picture(data))


def open_picture(data: bytes) -> Image.Image:
    """The picture in mode RGB, loaded: turned upright by its EXIF orientation, transparency laid on white.

    Of an animation the first frame is taken.

    Raises:
        MediaError: not a picture of a known format, damaged, truncated or too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise MediaError(f"{image.height}x{image.width} pixels: more than {MAX_PIXELS}")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # else it copies upright pictures too
            return _rgb(image)
    except (MediaError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise MediaError("not a readable picture (none of the formats " + ", ".join(FORMATS) + ")") from None
    except Exception as error:
        # Pillow's decoders raise whatever the damage provokes: OSError, SyntaxError, struct.error and more.
        raise MediaError(f"not a readable picture ({reason_of(error)})") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image  # which `convert` would copy
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
        grey = np.clip(np.asarray(image, dtype=np.int64) >> 8, 0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")

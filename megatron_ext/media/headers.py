"""What a picture or clip is, read without decoding it: its size, and of a clip its frames and their rate."""

from dataclasses import dataclass
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from megatron_ext.config import reason_of
from megatron_ext.media.errors import MediaError
from megatron_ext.media.pictures import FORMATS, MAX_PIXELS
from megatron_ext.media.samples import Sample
from megatron_ext.media.video import Video

_EXIF_ORIENTATION = 0x0112
_EXIF_LYING = (5, 6, 7, 8)  # EXIF 2.32, section 4.6.4 A: rows are stored as columns


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a picture or clip is."""

    height: int
    """Pixels, upright."""

    width: int
    """Pixels, upright."""

    num_frames: int = 1
    """Frames of a clip; 1 of a picture."""

    frame_rate: float = 0.0
    """Average frames per second of a clip; 0 of a picture."""

    codec: str
    """How it is encoded: FFmpeg's name of a clip's codec, Pillow's of a picture's format in small letters. What needs
    more than that name says (a clip to be turned or stretched, one with cover art, a JPEG of four colours) has `-other`
    at its end."""


def read_header(sample: Sample) -> Header:
    """Size, frames and codec of a sample. A clip's first frame is decoded, for its size and as a first check.

    Raises:
        MediaError: it is unreadable, of no known format or too large.
    """
    with sample.media.open() as file:
        return _picture_header(file) if sample.kind == "image" else _clip_header(file)


def _picture_header(file: BinaryIO) -> Header:
    try:
        with Image.open(file, formats=FORMATS) as image:
            # A PNG's own getexif() would decode the picture to look for a late eXIf chunk.
            exif = Image.Exif()
            if image.format == "PNG":
                exif.load(image.info.get("exif"))
            else:
                exif = image.getexif()
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise MediaError(f"{height}x{width} pixels: more than {MAX_PIXELS}")
            # Pillow gives a TIFF's size upright.
            if image.format != "TIFF" and exif.get(_EXIF_ORIENTATION) in _EXIF_LYING:
                height, width = width, height
            plain = image.format != "JPEG" or image.mode in ("RGB", "L")
            codec = image.format.lower() + ("" if plain else "-other")
    except (MediaError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise MediaError("not a readable picture (none of the formats " + ", ".join(FORMATS) + ")") from None
    except Exception as error:  # as in decode_picture: damage makes Pillow raise many classes
        raise MediaError(f"not a readable picture ({reason_of(error)})") from None
    return Header(height=height, width=width, codec=codec)


def _clip_header(file: BinaryIO) -> Header:
    with Video(file) as video:
        height, width = video.first_frame.size
        num_frames, frame_rate, counts_as_stored = video.summary
        is_plain = counts_as_stored and video.first_frame.is_shown_as_stored
        codec = video.codec + ("" if is_plain else "-other")
    return Header(height=height, width=width, num_frames=num_frames, frame_rate=float(frame_rate), codec=codec)

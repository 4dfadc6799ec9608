"""A decoded frame of a video, and how it is shown: turned, mirrored, with square pixels, in the right colours.

Shapes: H W pixels, C colour channels.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.sidedata.sidedata import Type

from megatron_ext.config import reason_of
from megatron_ext.media.errors import MediaError
from megatron_ext.media.pictures import MAX_PIXELS

CONVERTING_THREADS = 1
"""Of FFmpeg's conversion of pixels, which takes as many as there are cores by default: decoding processes share those,
and a process that was forked while a frame lived would wait for ever, when it frees it, for threads that it lacks."""


@contextlib.contextmanager
def faults() -> Iterator[None]:
    """FFmpeg's errors are many classes, and PyAV adds ValueError and OSError: all say that the clip is unreadable."""
    try:
        yield
    except (MediaError, MemoryError):
        raise
    except Exception as error:
        raise MediaError(f"not a readable clip ({reason_of(error)})") from None


@dataclass(frozen=True, kw_only=True)
class Orientation:
    """How a stored frame is turned and mirrored to be shown: rows and columns swapped, then either reversed."""

    is_transposed: bool = False
    reverses_rows: bool = False
    reverses_columns: bool = False

    @staticmethod
    def of(decoded: av.VideoFrame) -> "Orientation":
        """By the display matrix; one that is no quarter turn counts as the nearest."""
        data = decoded.side_data.get(Type.DISPLAYMATRIX)
        if data is None:
            return Orientation()
        # FFmpeg's libavutil/display.h: the stored pixel (x, y) is shown at (a x + c y, b x + d y).
        a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
        if abs(b) + abs(c) > abs(a) + abs(d):
            return Orientation(is_transposed=True, reverses_rows=b < 0, reverses_columns=c < 0)
        return Orientation(reverses_rows=d < 0, reverses_columns=a < 0)

    def apply(self, plane_HW: np.ndarray) -> np.ndarray:
        """The plane [H, W, ...] as it is shown; a view."""
        plane_HW = plane_HW.swapaxes(0, 1) if self.is_transposed else plane_HW
        return plane_HW[:: -1 if self.reverses_rows else 1, :: -1 if self.reverses_columns else 1]


class Frame:
    """A frame as it was decoded, when it is shown and how."""

    def __init__(self, decoded: av.VideoFrame, stamp: int, pixel_aspect: Fraction) -> None:
        """`pixel_aspect` is the width of a stored pixel over its height.

        Raises:
            MediaError: too large to be honest.
        """
        self.decoded = decoded
        self.stamp = stamp
        self.orientation = Orientation.of(decoded)
        self.pixel_aspect = pixel_aspect
        # The shorter side of a pixel grows: nothing is lost.
        self._square = round(decoded.height * max(1, 1 / pixel_aspect)), round(decoded.width * max(1, pixel_aspect))
        if self._square[0] * self._square[1] > MAX_PIXELS:
            raise MediaError(f"{self._square[0]}x{self._square[1]} pixels: more than {MAX_PIXELS}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels as it is shown."""
        return self._square[::-1] if self.orientation.is_transposed else self._square

    @property
    def is_shown_as_stored(self) -> bool:
        """Whether nothing has to be turned, mirrored or stretched."""
        return self.orientation == Orientation() and self._square == (self.decoded.height, self.decoded.width)

    def pixels(self, shorter_edge: int | None = None) -> np.ndarray:
        """RGB uint8 [H, W, C] as it is shown; reduced, where it is larger, to `shorter_edge`.

        Raises:
            MediaError: its pixels cannot be converted.
        """
        height, width = self._square
        filter_name = "BILINEAR" if self.pixel_aspect == 1 else "BICUBIC"
        if shorter_edge is not None and min(height, width) > shorter_edge:
            scale = shorter_edge / min(height, width)
            height, width, filter_name = round(height * scale), round(width * scale), "AREA"
        how = {"width": width, "height": height, "interpolation": filter_name, "threads": CONVERTING_THREADS}
        with faults():
            pixels = self.decoded.to_ndarray(format="rgb24", **how)
        return np.ascontiguousarray(self.orientation.apply(pixels))

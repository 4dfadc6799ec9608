"""The loader on the CPU: OpenCV decodes JPEGs, Pillow the other pictures, PyAV clips; torch brings them to size.

Torch's antialiased bicubic filter on uint8 is Pillow's, rounded in a few places to the neighbouring level, and several
times as fast; Pillow's is what pictures are tokenized with.

Shapes: T frames, H W pixels, C colour channels.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.media import MediaError, MediaIndex, decode_frames, decode_picture
from tokenizer_train.vision.order import Draw

REDUCED = {
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
"""Factors by which a JPEG can be decoded smaller, for a fraction of the work."""

REDUCTION_GAP = 3.0
"""A reduced crop keeps at least so many times the target's side, so that the final resize shapes the result. On the
sample photographs a pixel is then off by 0.34 levels of 255 on average, 0.6 in the worst picture (at 2 by 0.7 and 1.3,
at 4 by 0.24 and 0.45). Pillow's documentation of `reducing_gap` calls 3 indistinguishable from no reduction."""


class CpuLoader:
    """Decodes and cuts samples, in as many threads as call it."""

    name = "cpu"

    draws_at_once = 1
    """A call for every sample: threads share a batch."""

    def __init__(self, index: MediaIndex, *, smallest_scale: float, cache_bytes: int) -> None:
        """`smallest_scale` is the side of the smallest crop over the largest that fits: JPEGs are decoded smaller
        where no crop would miss it."""
        cv2.setNumThreads(1)  # the threads that call are the parallelism
        self._index = index
        self._smallest_scale = smallest_scale
        self._cache = ByteCache(cache_bytes)

    def decode(self, draws: Sequence[Draw]) -> list[Tensor | MediaError]:
        """Uint8 [H, W, C] of a picture, [T, H, W, C] of a clip; of what cannot be used the reason."""
        found: list[Tensor | MediaError] = []
        for draw in draws:
            try:
                found.append(self._cut(draw))
            except MediaError as error:
                found.append(error)
        return found

    def _cut(self, draw: Draw) -> Tensor:
        height, width = int(self._index.height[draw.sample]), int(self._index.width[draw.sample])
        reduction = 1 if draw.frames else self._reduction(draw, height, width)
        key = (draw.sample, reduction, draw.frames)
        decoded = self._cache.get(key, lambda: self._decoded(draw, reduction))
        expected = -(-height // reduction), -(-width // reduction)
        if decoded.shape[-3:-1] != expected:
            raise MediaError(f"{decoded.shape[-3]}x{decoded.shape[-2]} pixels, where {height}x{width} were expected")
        top, left, box_height, box_width = (max(0, round(number / reduction)) for number in draw.box)
        crop = decoded[..., top : top + max(1, box_height), left : left + max(1, box_width), :]
        return fit(torch.from_numpy(crop), draw)

    def _decoded(self, draw: Draw, reduction: int) -> np.ndarray:
        data = self._index[draw.sample].media.read()
        if draw.frames:
            return decode_frames(data, draw.frames)
        if self._index.codec(draw.sample) != "jpeg":
            return decode_picture(data)
        # The bytes of libjpeg-turbo's decoder, as Pillow's, turned upright by the EXIF orientation; None where damaged.
        picture = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), REDUCED.get(reduction, cv2.IMREAD_COLOR_RGB))
        if picture is None:
            raise MediaError("not a readable picture (damaged or truncated JPEG)")
        return picture if reduction == 1 else cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)

    def _reduction(self, draw: Draw, height: int, width: int) -> int:
        """The largest factor that leaves every crop of this sample REDUCTION_GAP times the target's size."""
        if self._index.codec(draw.sample) != "jpeg":
            return 1
        smallest = min(height / draw.height, width / draw.width) * self._smallest_scale
        return max((factor for factor in REDUCED if smallest / factor >= REDUCTION_GAP), default=1)


def fit(crop_HWC: Tensor, draw: Draw) -> Tensor:
    """The uint8 crop [..., H, W, C] at the draw's size, mirrored where drawn."""
    if crop_HWC.shape[-3:-1] != (draw.height, draw.width):
        crop_NCHW = crop_HWC.movedim(-1, -3).reshape(-1, 3, *crop_HWC.shape[-3:-1])
        size = (draw.height, draw.width)
        fitted_NCHW = F.interpolate(crop_NCHW, size=size, mode="bicubic", antialias=True, align_corners=False)
        crop_HWC = fitted_NCHW.movedim(-3, -1).reshape(*crop_HWC.shape[:-3], *size, 3)
    return crop_HWC.flip(-2) if draw.is_mirrored else crop_HWC


class ByteCache:
    """The arrays used last, up to a number of bytes; shared by threads."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held = 0
        self._arrays: OrderedDict[object, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of `key`, made where it is not held. Two threads may make the same one; both are right."""
        with self._lock:
            if key in self._arrays:
                self._arrays.move_to_end(key)
                return self._arrays[key]
        array = make()
        if array.nbytes > self._capacity:
            return array
        with self._lock:
            if key not in self._arrays:
                self._arrays[key] = array
                self._held += array.nbytes
                while self._held > self._capacity:
                    self._held -= self._arrays.popitem(last=False)[1].nbytes
        return array

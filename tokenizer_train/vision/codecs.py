"""What is compared on the same pictures: vision tokenizers, and two codecs that need no training.

Shapes: B samples, T frames (1 of a picture), H W pixels, C colour channels; codes [B, t, h, w].
"""

import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_ext.config import InputError
from megatron_ext.runtime.device import synchronize
from megatron_ext.vision import MoVQGAN, from_uint8, to_uint8

BEST_JPEG_QUALITY = 95  # above it files grow without visible gain (Pillow's documentation)
_START_OF_SCAN = 0xDA


@dataclass(frozen=True, kw_only=True)
class Coded:
    """What a codec made of a batch."""

    decoded_BTHWC: np.ndarray
    """Uint8."""

    bits: float
    """Bits of one sample."""

    codes: Tensor | None = None
    """Codes of a tokenizer."""

    encode_s: float = 0.0
    """Seconds that encoding the batch took; 0 where it was not measured."""

    decode_s: float = 0.0
    """Seconds that decoding took."""


class Codec(Protocol):
    """A way to bring pictures and clips through few bits."""

    name: str

    def __call__(self, frames_BTHWC: np.ndarray, *, is_clip: bool) -> Coded:
        """Encode and decode uint8 frames; stills have T = 1."""


class TokenizerCodec:
    """A vision tokenizer in evaluation mode."""

    def __init__(
        self, name: str, model: MoVQGAN, device: torch.device, dtype: torch.dtype, clips: Literal["chunks", "stream"]
    ) -> None:
        self.name = name
        self.identity = model.identity
        self.model = model.eval().to(device, dtype)
        self._device, self._dtype, self._clips = device, dtype, clips

    @torch.inference_mode()
    def __call__(self, frames_BTHWC: np.ndarray, *, is_clip: bool) -> Coded:
        pixels = from_uint8(frames_BTHWC if is_clip else frames_BTHWC[:, 0]).to(self._device, self._dtype)
        encode, decode = (self._encode_clip, self._decode_clip) if is_clip else (self.model.encode, self.model.decode)
        codes, encode_s = self._timed(encode, pixels)
        drawn, decode_s = self._timed(decode, codes)
        frames = to_uint8(drawn)
        return Coded(
            decoded_BTHWC=frames if is_clip else frames[:, None],
            bits=codes[0].numel() * math.log2(self.model.config.codebook_size),
            codes=codes.cpu(),
            encode_s=encode_s,
            decode_s=decode_s,
        )

    def _encode_clip(self, pixels_BTCHW: Tensor) -> Tensor:
        if self._clips == "chunks":
            return self.model.encode_chunks(pixels_BTCHW)
        return torch.cat(list(self.model.encode_stream(pixels_BTCHW.split(self._piece, dim=1))), dim=1)

    def _decode_clip(self, codes_Bthw: Tensor) -> Tensor:
        if self._clips == "chunks":
            return self.model.decode_chunks(codes_Bthw)
        return torch.cat(list(self.model.decode_stream(codes_Bthw.split(1, dim=1))), dim=1)

    @property
    def _piece(self) -> int:
        return self.model.config.temporal_downsample_factor

    def _timed(self, work: Callable[[Tensor], Tensor], given: Tensor) -> tuple[Tensor, float]:
        synchronize(self._device)
        started = time.perf_counter()
        result = work(given)
        synchronize(self._device)
        return result, time.perf_counter() - started


class Bicubic:
    """Each frame reduced and enlarged again: what a tokenizer of that factor must beat to be worth its weights."""

    def __init__(self, factor: int) -> None:
        self.name = f"bicubic {factor}x"
        self._factor = factor

    def __call__(self, frames_BTHWC: np.ndarray, *, is_clip: bool) -> Coded:
        height, width = frames_BTHWC.shape[2:4]
        small = _resized(frames_BTHWC, height // self._factor, width // self._factor)
        return Coded(decoded_BTHWC=_resized(small, height, width), bits=8.0 * small[0].size)


class Jpeg:
    """JPEG (4:2:0) at the best quality whose data are no more bits than a tokenizer's codes.

    The frames behind one frame of codes are one picture, one above the other. Headers are not counted: their tables
    are the same for all pictures of a quality. Where quality 1 is too much, the picture is halved until it fits.
    """

    def __init__(self, tokenizer: TokenizerCodec) -> None:
        self.name = f"JPEG, bits of {tokenizer.name}"
        config = tokenizer.model.config
        self.budget = (config.spatial_factor, config.temporal_downsample_factor, config.codebook_size)
        """Tokenizers of equal budgets need one row."""

    def __call__(self, frames_BTHWC: np.ndarray, *, is_clip: bool) -> Coded:
        space, time_factor, codebook_size = self.budget
        batch, frames, height, width, channels = frames_BTHWC.shape
        group = time_factor if is_clip else 1
        bits = (height // space) * (width // space) * math.log2(codebook_size)
        tall = frames_BTHWC.reshape(batch, frames // group, group * height, width, channels)
        decoded, spent = np.empty_like(tall), 0
        for index in np.ndindex(tall.shape[:2]):
            decoded[index], used = jpeg_within(tall[index], int(bits))
            spent += used
        return Coded(decoded_BTHWC=decoded.reshape(frames_BTHWC.shape), bits=spent / batch)


def jpeg_within(picture_HWC: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
    """The picture after the best JPEG whose scan has at most `bits` bits, and the bits it has.

    Raises:
        InputError: not even one pixel fits.
    """
    height, width = picture_HWC.shape[:2]
    small = picture_HWC
    while True:
        low, high = 1, BEST_JPEG_QUALITY
        best = None
        while low <= high:
            quality = (low + high) // 2
            data = _jpeg(small, quality)
            if (used := 8 * scan_bytes(data)) <= bits:
                best, low = (data, used), quality + 1
            else:
                high = quality - 1
        if best is not None:
            decoded = np.asarray(Image.open(io.BytesIO(best[0])).convert("RGB"))
            return _resized(decoded, height, width), best[1]
        if max(small.shape[:2]) == 1:
            raise InputError(f"{bits} bits for a picture of {height}x{width}: no JPEG is that small")
        small = _resized(picture_HWC, max(1, small.shape[0] // 2), max(1, small.shape[1] // 2))


def _jpeg(picture_HWC: np.ndarray, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture_HWC).save(file, format="JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()


def scan_bytes(data: bytes) -> int:
    """Length of the picture's data in a JPEG of one scan: what follows its headers (ITU T.81, annex B)."""
    position = 2  # start of image
    while data[position + 1] != _START_OF_SCAN:
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return len(data) - position - 2  # end of image


def _resized(frames_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Uint8 frames [..., H, W, C], bicubic."""
    if frames_HWC.shape[-3:-1] == (height, width):
        return frames_HWC
    flat = frames_HWC.reshape(-1, *frames_HWC.shape[-3:])
    resized = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in flat]
    return np.stack([np.asarray(frame) for frame in resized]).reshape(*frames_HWC.shape[:-3], height, width, -1)

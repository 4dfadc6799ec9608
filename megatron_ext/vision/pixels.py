"""Between 8-bit frames and the tokenizer's pixels in [-1, 1].

Shapes: ... any leading axes, H W pixels, C colour channels.
"""

import numpy as np
import torch
from torch import Tensor


def from_uint8(frames_HWC: np.ndarray | Tensor) -> Tensor:
    """Float32 [..., C, H, W] in [-1, 1] of uint8 [..., H, W, C]: x / 255, mean 0.5, deviation 0.5."""
    if isinstance(frames_HWC, np.ndarray):
        frames_HWC = torch.tensor(np.ascontiguousarray(frames_HWC))
    # The bytes are transposed, not the four times as many of the floats.
    return frames_HWC.movedim(-1, -3).contiguous().float().div_(127.5).sub_(1.0)


def to_uint8(pixels_CHW: Tensor) -> np.ndarray:
    """Uint8 [..., H, W, C] of pixels [..., C, H, W]; values outside [-1, 1] are clipped."""
    scaled = pixels_CHW.detach().float().add(1.0).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).movedim(-3, -1).cpu().numpy()

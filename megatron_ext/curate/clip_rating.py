"""The aesthetic score of a clip's frames, by LAION's predictor."""

import numpy as np
import torch

from megatron_ext.config.runtime import DeviceName, RuntimeConfig
from megatron_ext.curate.aesthetic import AestheticPredictor, clip_square
from megatron_ext.runtime.device import choose_device


class ClipRating:
    """The predictor on its device."""

    def __init__(self, clip: str, head: str, device: DeviceName) -> None:
        """As `AestheticPredictor`. Raises InputError as it does."""
        predictor = AestheticPredictor(clip, head)
        self.identity = predictor.identity
        """Of all weights."""
        self._predictor = predictor.to(choose_device(RuntimeConfig(device=device), 0))

    def __call__(self, frames_THWC: np.ndarray) -> list[float]:
        """Score of each RGB uint8 frame."""
        squares = [clip_square(frame_HWC, self._predictor.side) for frame_HWC in frames_THWC]
        return self._predictor(torch.from_numpy(np.stack(squares))).tolist()

"""Two loaders behind one protocol, and the choice between them."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_ext.config import InputError
from megatron_ext.media import MediaError, MediaIndex
from tokenizer_train.vision.config_media import MediaConfig
from tokenizer_train.vision.loader_cpu import CpuLoader
from tokenizer_train.vision.order import Draw

MEGABYTE = 1_000_000


class Loader(Protocol):
    """Decodes samples and cuts them as drawn."""

    name: str
    """For people."""

    draws_at_once: int
    """Draws of one call, at most: 1 where threads share a batch, a batch where the loader is parallel itself."""

    def decode(self, draws: Sequence[Draw]) -> list[Tensor | MediaError]:
        """Uint8 [H, W, C] of a picture, [T, H, W, C] of a clip; of what cannot be used the reason."""


def choose_loader(
    config: MediaConfig, index: MediaIndex, *, device: torch.device, largest_batch: int
) -> tuple[Loader, int]:
    """The loader that `media.loader` asks for, and how many threads may call it at a time.

    Raises:
        InputError: dali is asked for and not installed, or not wholly.
    """
    smallest_scale = config.smallest_crop if config.augmented_share else 1.0
    cpu = CpuLoader(index, smallest_scale=smallest_scale, cache_bytes=config.cache_megabytes * MEGABYTE)
    if config.loader == "cpu" or (config.loader == "auto" and device.type == "cpu"):
        return cpu, config.workers
    device_id = None if device.type == "cpu" else device.index or 0
    try:
        from tokenizer_train.vision.loader_dali import DaliLoader

        dali = DaliLoader(index, cpu, device_id=device_id, threads=config.workers, largest_batch=largest_batch)
    except (ImportError, RuntimeError) as error:
        if config.loader == "auto":
            return cpu, config.workers
        raise InputError(
            f"media.loader = 'dali': NVIDIA DALI does not start ({error}): pip install nvidia-dali-cuda130, or set "
            "media.loader to cpu"
        ) from None
    return dali, 1

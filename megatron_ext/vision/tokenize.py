"""Decoded samples to codes, in batches of equal size.

Which samples are encoded together depends on their order alone, never on timing or on who decoded them.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from megatron_ext.media.decode import DecodedSample
from megatron_ext.media.samples import readable_name
from megatron_ext.vision.movqgan import MoVQGAN
from megatron_ext.vision.pixels import from_uint8
from megatron_ext.vision.shards import TokenizedSample

MAX_WAITING_BYTES = 1 << 30
"""Pixels that may wait for others of their shape; past it the largest batch is encoded as it is."""


def tokenize(
    decoded_samples: Iterable[DecodedSample],
    model: MoVQGAN,
    *,
    batch_size: int,
    advance: Callable[[int], None],
) -> list[TokenizedSample]:
    """Codes of the samples, whose keys differ, in their order.

    Samples wait until `batch_size` of one shape are there, or MAX_WAITING_BYTES in all; `advance` is told how many
    are done.
    """
    tokenized: dict[str, TokenizedSample] = {}
    waiting: dict[tuple[int, ...], list[DecodedSample]] = {}
    order = []

    def encode(shape: tuple[int, ...]) -> None:
        batch = waiting.pop(shape)
        tokenized.update(_encode(batch, model))
        advance(len(batch))

    def waiting_bytes(shape: tuple[int, ...]) -> int:
        return len(waiting[shape]) * math.prod(shape)

    for decoded in decoded_samples:
        order.append(decoded.sample.key)
        shape = decoded.frames.shape
        waiting.setdefault(shape, []).append(decoded)
        if len(waiting[shape]) == batch_size:
            encode(shape)
        elif sum(map(waiting_bytes, waiting)) > MAX_WAITING_BYTES:
            encode(max(waiting, key=waiting_bytes))
    for shape in list(waiting):
        encode(shape)
    return [tokenized[key] for key in order]


def _encode(batch: list[DecodedSample], model: MoVQGAN) -> dict[str, TokenizedSample]:
    device = next(model.parameters()).device
    frames = np.stack([decoded.frames for decoded in batch])
    pixels = from_uint8(frames).to(device)
    with torch.inference_mode():
        codes = (model.encode(pixels) if pixels.ndim == 4 else model.encode_chunks(pixels)).cpu().numpy()
    return {
        decoded.sample.key: TokenizedSample(
            key=decoded.sample.key,
            kind=decoded.sample.kind,
            codes=sample_codes,
            captions=decoded.captions,
            source=readable_name(decoded.sample.source),
            source_sha256=decoded.sha256,
            **decoded.clip_fields,
        )
        for decoded, sample_codes in zip(batch, codes, strict=True)
    }

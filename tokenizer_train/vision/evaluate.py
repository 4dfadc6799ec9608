"""How well a vision tokenizer reconstructs: PSNR, use of the codebook, a picture to look at.

Shapes: T frames, C colour channels, H W pixels, K codes.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_ext.vision import MoVQGAN, from_uint8, to_uint8
from tokenizer_train.vision.codebook import perplexity
from tokenizer_train.vision.data import TrainingMedia

GRID_COLUMNS = 16
LINE = 2


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """A picture [1, H, W, C] or a clip [T, H, W, C], and what the tokenizer makes of it, uint8."""

    original: np.ndarray
    decoded: np.ndarray
    codes: Tensor
    is_clip: bool

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in decibels, of the 8-bit values."""
        return psnr(self.original, self.decoded)


def psnr(original: np.ndarray, decoded: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 arrays in decibels: 10 log10(255^2 / mean squared error)."""
    error = np.mean((original.astype(np.float64) - decoded.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


@torch.no_grad()
def reconstruct(model: MoVQGAN, media: TrainingMedia, limit: int) -> list[Reconstruction]:
    """At most `limit` pictures and `limit` clips through the tokenizer in evaluation mode, in fp32, as in use."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    device = next(model.parameters()).device
    found = []
    for sample in (*media.pictures[:limit], *media.clips[:limit]):
        original = media.whole(sample)
        if original is None:
            continue
        pixels = from_uint8(original)[None].to(device)
        is_clip = sample.kind == "video"
        codes = model.encode_chunks(pixels) if is_clip else model.encode(pixels)
        decoded = to_uint8(model.decode_chunks(codes) if is_clip else model.decode(codes))
        if not is_clip:
            original, decoded = original[None], decoded[None]
        found.append(Reconstruction(original=original, decoded=decoded[0], codes=codes.cpu(), is_clip=is_clip))
    for module, mode in was_training.items():
        module.training = mode
    return found


def metrics(reconstructions: list[Reconstruction], codebook_size: int) -> dict[str, float]:
    """`valid_*` numbers of a metrics line: mean PSNR of pictures and of clips, codes in use, perplexity."""
    result = {}
    for name, clips in (("valid_psnr", False), ("valid_psnr_clips", True)):
        values = [item.psnr for item in reconstructions if item.is_clip == clips]
        if values:
            result[name] = float(np.mean(values))
    codes = torch.cat([item.codes.flatten() for item in reconstructions])
    counts_K = torch.bincount(codes, minlength=codebook_size)
    return result | {"valid_codes_used": int((counts_K > 0).sum()), "valid_perplexity": perplexity(counts_K)}


def save_grid(reconstructions: list[Reconstruction], path: Path) -> None:
    """A PNG of rows of originals, each with the row of their reconstructions below; clips give all their frames."""
    pairs = [pair for item in reconstructions for pair in zip(item.original, item.decoded, strict=True)]
    height, width = pairs[0][0].shape[:2]
    columns = min(GRID_COLUMNS, len(pairs))
    rows = -(-len(pairs) // columns)
    grid = np.full((rows * (2 * height + LINE), columns * width, 3), 255, np.uint8)
    for index, pair in enumerate(pairs):
        row, column = divmod(index, columns)
        for half, picture in enumerate(pair):
            top = row * (2 * height + LINE) + half * height
            grid[top : top + height, column * width : (column + 1) * width] = picture
    temporary = path.with_name(path.name + ".tmp")
    Image.fromarray(grid).save(temporary, format="PNG")
    os.replace(temporary, path)

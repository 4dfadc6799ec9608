"""Vector quantizers: how a latent becomes the index of a codebook vector, and back; no losses, no training.

`nearest`   Emu3's: the nearest vector by squared Euclidean distance, however the codebook was trained: by gradient or
            as moving averages.
`ibq`       Emu3.5's (index backpropagation, Shi et al. 2024): the vector of the largest inner product.

Shapes: B batch, D vector size, T latent frames, H W code grid, K codebook entries, N vectors.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

QuantizerName = Literal["nearest", "ibq"]

ELEMENTS_AT_ONCE = 1 << 24
"""Numbers of the [N, K] matrix that exist at a time: 64 MiB in float32, whatever the picture and the codebook."""


def nearest_codes(latents_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """[N]: index of the nearest code of every latent, |z|^2 + |e|^2 - 2 z.e in the order of E3:447-468."""
    square_K = codebook_KD.square().sum(1)

    def choose(rows_ND: Tensor) -> Tensor:
        distances_NK = rows_ND.square().sum(1, keepdim=True) + square_K
        return distances_NK.sub_(rows_ND @ codebook_KD.T, alpha=2).argmin(1)

    return _by_rows(choose, latents_ND, codebook_KD)


def largest_product_codes(latents_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """[N]: index of the code with the largest inner product, the argmax of Emu3.5's softmax over z.e."""
    return _by_rows(lambda rows_ND: (rows_ND @ codebook_KD.T).argmax(1), latents_ND, codebook_KD)


def rows_at_once(codebook_size: int) -> int:
    """Latents whose scores against all codes are held at a time."""
    return max(1, ELEMENTS_AT_ONCE // codebook_size)


def _by_rows(choose: Callable[[Tensor], Tensor], latents_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    return torch.cat([choose(rows_ND) for rows_ND in latents_ND.split(rows_at_once(len(codebook_KD)))])


class Quantizer(Protocol):
    """What the tokenizer and its training need of a quantizer; it is also an nn.Module."""

    embedding: nn.Embedding
    """The codebook, [K, D]; `quantize.embedding.weight` on disk."""

    def assign(self, latents_BDTHW: Tensor) -> Tensor:
        """The code of every latent, int64 [B, T, H, W]; without gradient, in float32 whatever the networks run in."""

    def lookup(self, codes_BTHW: Tensor) -> Tensor:
        """Codebook vectors [B, D, T, H, W] of the codes."""


class _CodebookQuantizer(nn.Module):
    """What quantizers share: a codebook, and latents as rows."""

    def __init__(self, codebook_size: int, vector_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, vector_size)

    def choose(self, latents_ND: Tensor, codebook_KD: Tensor) -> Tensor:
        """[N]: the code of every row."""
        raise NotImplementedError

    @torch.no_grad()
    def assign(self, latents_BDTHW: Tensor) -> Tensor:
        """As `Quantizer.assign`."""
        batch, vector_size, *grid = latents_BDTHW.shape
        # Scores in bf16 would tie thousands of codes.
        with torch.autocast(latents_BDTHW.device.type, enabled=False):
            latents_ND = latents_BDTHW.movedim(1, -1).reshape(-1, vector_size).float()
            return self.choose(latents_ND, self.embedding.weight.float()).view(batch, *grid)

    def lookup(self, codes_BTHW: Tensor) -> Tensor:
        """As `Quantizer.lookup`."""
        return self.embedding(codes_BTHW).movedim(-1, 1)


class VectorQuantizer(_CodebookQuantizer):
    """Nearest neighbour; no normalisation, codes initialised U(-1/K, 1/K) (E3:447-468)."""

    def __init__(self, codebook_size: int, vector_size: int) -> None:
        super().__init__(codebook_size, vector_size)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    def choose(self, latents_ND: Tensor, codebook_KD: Tensor) -> Tensor:
        """[N]: the nearest code."""
        return nearest_codes(latents_ND, codebook_KD)


class IndexQuantizer(_CodebookQuantizer):
    """Largest inner product; no normalisation, codes initialised N(0, 1).

    Source: github.com/baaivision/Emu3.5 src/vision_tokenizer/modules/vqvae/quantize.py, IndexPropagationQuantize.
    """

    def choose(self, latents_ND: Tensor, codebook_KD: Tensor) -> Tensor:
        """[N]: the code of the largest product."""
        return largest_product_codes(latents_ND, codebook_KD)


def build_quantizer(name: QuantizerName, codebook_size: int, vector_size: int) -> VectorQuantizer | IndexQuantizer:
    """A quantizer with fresh codes."""
    return {"nearest": VectorQuantizer, "ibq": IndexQuantizer}[name](codebook_size, vector_size)

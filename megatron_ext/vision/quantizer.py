"""Vector quantiser: the nearest codebook vector by squared Euclidean distance.

Shapes: B batch, D vector size, T latent frames, H W code grid, K codebook entries, N vectors.
"""

import torch
from torch import Tensor, nn

ROWS_AT_ONCE = 8192  # the [rows, K] distance matrix of a large picture would take gigabytes at K = 32768


class VectorQuantizer(nn.Module):
    """A codebook of K vectors; no normalisation, initialised U(-1/K, 1/K) (E3:447-468)."""

    def __init__(self, codebook_size: int, vector_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, vector_size)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    @torch.no_grad()
    def nearest(self, latents_BDTHW: Tensor) -> Tensor:
        """Index of the nearest code, int64 [B, T, H, W]; always in float32, whatever the networks run in."""
        batch, vector_size, *grid = latents_BDTHW.shape
        z_ND = latents_BDTHW.movedim(1, -1).reshape(-1, vector_size).float()
        e_KD = self.embedding.weight.float()
        e_square_K = e_KD.square().sum(1)
        codes = [
            (rows_ND.square().sum(1, keepdim=True) + e_square_K - 2 * rows_ND @ e_KD.T).argmin(1)
            for rows_ND in z_ND.split(ROWS_AT_ONCE)
        ]
        return torch.cat(codes).view(batch, *grid)

    def lookup(self, codes_BTHW: Tensor) -> Tensor:
        """Codebook vectors [B, D, T, H, W] of the codes."""
        return self.embedding(codes_BTHW).movedim(-1, 1)

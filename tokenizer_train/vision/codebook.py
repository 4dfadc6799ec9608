"""What keeps a codebook from collapsing: k-means placement and restart of dead codes.

Emu3's own initial codes, U(-1/K, 1/K), lie in a cube far smaller than the latents: a few of them win every latent, and
the commitment loss then pulls the encoder onto those few.
Shapes: N vectors, D vector size, K codes.
"""

import torch
from torch import Tensor, nn


@torch.no_grad()
def kmeans(vectors_ND: Tensor, count: int, iterations: int, generator: torch.Generator) -> Tensor:
    """[count, D]: centres of Lloyd's algorithm from random vectors; an empty cluster restarts at a random one."""
    centres_KD = _random_rows(vectors_ND, count, generator)
    for _ in range(iterations):
        nearest_N = _nearest(vectors_ND, centres_KD)
        sizes_K = torch.bincount(nearest_N, minlength=count)
        sums_KD = torch.zeros_like(centres_KD).index_add_(0, nearest_N, vectors_ND)
        random_KD = _random_rows(vectors_ND, count, generator)
        centres_KD = torch.where((sizes_K > 0)[:, None], sums_KD / sizes_K.clamp(min=1)[:, None], random_KD)
    return centres_KD


def _nearest(vectors_ND: Tensor, centres_KD: Tensor, rows: int = 8192) -> Tensor:
    return torch.cat([torch.cdist(part_ND, centres_KD).argmin(1) for part_ND in vectors_ND.split(rows)])


def _random_rows(vectors_ND: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows, different ones where there are enough."""
    if len(vectors_ND) >= count:
        rows = torch.randperm(len(vectors_ND), generator=generator)[:count]
    else:
        rows = torch.randint(len(vectors_ND), (count,), generator=generator)
    return vectors_ND[rows.to(vectors_ND.device)]


@torch.no_grad()
def restart_dead_codes(
    embedding: nn.Embedding,
    used_K: Tensor,
    latents_ND: Tensor,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> int:
    """Move the codes that are not in `used_K` (bool) onto random latents; the number of them.

    The optimizer forgets their momentum, which would carry them on in the direction of their former place.
    """
    dead = (~used_K).nonzero().squeeze(1)
    if not len(dead):
        return 0
    embedding.weight[dead] = _random_rows(latents_ND, len(dead), generator).to(embedding.weight.dtype)
    for name, moment in optimizer.state.get(embedding.weight, {}).items():
        if name != "step":
            moment[dead] = 0
    return len(dead)


def perplexity(counts_K: Tensor) -> float:
    """exp of the entropy of how often each code is used: K when all are used equally."""
    share_K = counts_K.double() / counts_K.sum().clamp(min=1)
    return float(torch.special.entr(share_K).sum().exp())

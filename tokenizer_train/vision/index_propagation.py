"""Gradients through the softmax over a whole codebook without ever holding it (Emu3.5's IBQ).

Upstream holds several [N, K] matrices: at 131,072 codes and one 512 px picture (N = 1,024) each takes 512 MiB. Both
functions here go over the latents in groups of rows, and again in the backward pass, where the scores are computed a
second time: at most quantizer.ELEMENTS_AT_ONCE numbers of a matrix exist at a time (four matrices of 64 MiB in
float32), and the graph keeps only latents, codes and codebook.

Shapes: N latents, D vector size, K codes.
Source: github.com/baaivision/Emu3.5 src/vision_tokenizer/modules/vqvae/quantize.py, cited as IBQ.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.vision.quantizer import rows_at_once

MEAN_EPS = 1e-5
"""Added to the mean probabilities before their logarithm (IBQ:compute_entropy_loss)."""


def propagate_indices(latents_ND: Tensor, codebook_KD: Tensor, codes_N: Tensor) -> Tensor:
    """[N, D]: the codes' vectors, with the gradient of (hard - soft.detach() + soft) @ codebook, soft = softmax(z.e).

    The latents get it through soft alone; every code gets it through its score, the chosen ones also as themselves.
    """
    return _IndexPropagation.apply(latents_ND, codebook_KD, codes_N)


def code_entropies(
    latents_ND: Tensor, codebook_KD: Tensor, temperature: float, mean_over_ranks: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean entropy of softmax(z.e / temperature), and the entropy of its mean over all latents of all ranks; nats.

    `mean_over_ranks` maps [K] to its mean over ranks with equally many latents; it needs no gradient. The gradient of
    the second entropy is that of the whole batch's, once ranks' gradients are averaged, as DDP does.
    """
    return _CodeEntropies.apply(latents_ND, codebook_KD, temperature, mean_over_ranks)


def _groups(latents_ND: Tensor, codebook_KD: Tensor) -> Iterator[slice]:
    rows = rows_at_once(len(codebook_KD))
    return (slice(start, start + rows) for start in range(0, len(latents_ND), rows))


class _IndexPropagation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latents_ND: Tensor, codebook_KD: Tensor, codes_N: Tensor) -> Tensor:
        ctx.save_for_backward(latents_ND, codebook_KD, codes_N)
        return codebook_KD[codes_N]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        latents_ND, codebook_KD, codes_N = ctx.saved_tensors
        grad_latents_ND = torch.empty_like(latents_ND)
        grad_codebook_KD = torch.zeros_like(codebook_KD).index_add_(0, codes_N, grad_ND)
        for rows in _groups(latents_ND, codebook_KD):
            soft_NK = (latents_ND[rows] @ codebook_KD.T).softmax(1)
            grad_soft_NK = grad_ND[rows] @ codebook_KD.T
            grad_soft_NK -= (soft_NK * grad_soft_NK).sum(1, keepdim=True)
            grad_scores_NK = soft_NK.mul_(grad_soft_NK)
            grad_latents_ND[rows] = grad_scores_NK @ codebook_KD
            grad_codebook_KD.addmm_(grad_scores_NK.T, latents_ND[rows])
        return grad_latents_ND, grad_codebook_KD, None


class _CodeEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latents_ND: Tensor, codebook_KD: Tensor, temperature: float, mean_over_ranks):
        sample_entropy, mean_K = latents_ND.new_zeros(()), codebook_KD.new_zeros(len(codebook_KD))
        for rows in _groups(latents_ND, codebook_KD):
            log_NK = (latents_ND[rows] @ codebook_KD.T).div_(temperature).log_softmax(1)
            probabilities_NK = log_NK.exp()
            mean_K += probabilities_NK.sum(0) / len(latents_ND)
            sample_entropy -= log_NK.mul_(probabilities_NK).sum() / len(latents_ND)
        mean_K = mean_over_ranks(mean_K)
        ctx.save_for_backward(latents_ND, codebook_KD, mean_K)
        ctx.temperature = temperature
        return sample_entropy, -(mean_K * (mean_K + MEAN_EPS).log()).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sample: Tensor, grad_batch: Tensor) -> tuple[Tensor, Tensor, None, None]:
        latents_ND, codebook_KD, mean_K = ctx.saved_tensors
        grad_latents_ND, grad_codebook_KD = torch.empty_like(latents_ND), torch.zeros_like(codebook_KD)
        slope_K = -((mean_K + MEAN_EPS).log() + mean_K / (mean_K + MEAN_EPS)) * grad_batch
        for rows in _groups(latents_ND, codebook_KD):
            log_NK = (latents_ND[rows] @ codebook_KD.T).div_(ctx.temperature).log_softmax(1)
            probabilities_NK = log_NK.exp()
            # d(-sum p log p)/dp is -log p - 1; the 1, like every constant, drops out of the softmax's derivative.
            gain_NK = log_NK.mul_(-grad_sample).add_(slope_K)
            gain_NK -= (probabilities_NK * gain_NK).sum(1, keepdim=True)
            grad_scores_NK = probabilities_NK.mul_(gain_NK).div_(len(latents_ND) * ctx.temperature)
            grad_latents_ND[rows] = grad_scores_NK @ codebook_KD
            grad_codebook_KD.addmm_(grad_scores_NK.T, latents_ND[rows])
        return grad_latents_ND, grad_codebook_KD, None, None

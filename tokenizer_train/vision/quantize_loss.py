"""What quantization adds to the loss, per quantizer: functions of tensors.

    quantized = quantize_latents(model.quantize, latents)  # codes, vectors, what the decoder draws from
    terms = quantizer_terms(quantized, entropy_temperature=0.01 or None, mean_over_ranks=...)

Every term is an unweighted scalar; sg is stop-gradient. Weights of VQ-VAE (van den Oord et al. 2017), of SBER and
taming (the `legacy` order: VectorQuantizer2(legacy=True), github.com/ai-forever/MoVQGAN
movqgan/modules/vqvae/quantize.py) and of Emu3.5; the last two terms are those of `ibq` alone:

| term              | is                                           | VQ-VAE      | legacy      | Emu3.5      |
| codebook          | mean (vectors - sg latents)^2, moves codes   | 1           | beta (0.25) | beta (0.25) |
| commitment        | mean (sg vectors - latents)^2, moves latents | beta (0.25) | 1           | 1           |
| index_propagation | mean (vectors - latents)^2 through softmax   |             |             | 1           |
| entropy           | mean entropy - entropy of the mean           |             |             | unpublished |

A codebook of moving averages (codebook.update: ema) has weight 0 for `codebook`: `CodebookKeeper` moves it.

Shapes: B batch, D codebook vector size, T latent frames, H W code grid, N latents, K codes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.vision.quantizer import IndexQuantizer, Quantizer
from tokenizer_train.vision.index_propagation import code_entropies, propagate_indices


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Latents and the codes chosen for them."""

    latents_BDTHW: Tensor
    """What the encoder says."""

    codes_BTHW: Tensor
    """Index of the chosen code."""

    vectors_BDTHW: Tensor
    """The codes' vectors; their gradient goes to the codebook."""

    @property
    def passed_through_BDTHW(self) -> Tensor:
        """What the decoder draws from: the vectors, with the latents' gradient (straight-through estimator)."""
        return self.latents_BDTHW + (self.vectors_BDTHW - self.latents_BDTHW).detach()


@dataclass(frozen=True, kw_only=True)
class IndexQuantized(Quantized):
    """The same of Emu3.5's quantizer."""

    codebook_KD: Tensor
    """All codes, which all take part in the gradient."""

    @cached_property
    def latents_ND(self) -> Tensor:
        """The latents as rows."""
        return self.latents_BDTHW.movedim(1, -1).flatten(0, -2)

    @cached_property
    def passed_through_BDTHW(self) -> Tensor:
        """What the decoder draws from: the vectors, with a gradient to latents and every code through the softmax."""
        vectors_ND = propagate_indices(self.latents_ND, self.codebook_KD, self.codes_BTHW.flatten())
        return vectors_ND.unflatten(0, self.codes_BTHW.shape).movedim(-1, 1)


def quantize_latents(quantizer: Quantizer, latents_BDTHW: Tensor) -> Quantized:
    """The latents' codes, differentiable as the quantizer wants it; in float32, autocast or not."""
    with torch.autocast(latents_BDTHW.device.type, enabled=False):
        latents_BDTHW = latents_BDTHW.float()
        codes_BTHW = quantizer.assign(latents_BDTHW)
        found = {
            "latents_BDTHW": latents_BDTHW,
            "codes_BTHW": codes_BTHW,
            "vectors_BDTHW": quantizer.lookup(codes_BTHW),
        }
        if isinstance(quantizer, IndexQuantizer):
            return IndexQuantized(**found, codebook_KD=quantizer.embedding.weight)
        return Quantized(**found)


def same_on_one_rank(mean_K: Tensor) -> Tensor:
    """The mean over ranks where there is one."""
    return mean_K


def quantizer_terms(
    quantized: Quantized,
    *,
    entropy_temperature: float | None = None,
    mean_over_ranks: Callable[[Tensor], Tensor] = same_on_one_rank,
) -> dict[str, Tensor]:
    """The terms of the module's table, each a scalar.

    The entropy of an IBQ is left out where `entropy_temperature` is None (a second pass over all scores). It is that of
    softmax(z.e / temperature); the mean's is over the latents of all ranks, which must be equally many on each.
    """
    terms = {
        "codebook": F.mse_loss(quantized.vectors_BDTHW, quantized.latents_BDTHW.detach()),
        "commitment": F.mse_loss(quantized.latents_BDTHW, quantized.vectors_BDTHW.detach()),
    }
    if isinstance(quantized, IndexQuantized):
        terms["index_propagation"] = F.mse_loss(quantized.passed_through_BDTHW, quantized.latents_BDTHW)
        if entropy_temperature is not None:
            sample, batch = code_entropies(
                quantized.latents_ND, quantized.codebook_KD, entropy_temperature, mean_over_ranks
            )
            terms["entropy"] = sample - batch
    return terms

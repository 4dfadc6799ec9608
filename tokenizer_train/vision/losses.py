"""Losses of a vision tokenizer: functions of tensors.

Shapes: ... any leading axes, C colour channels, H W pixels; B batch, D codebook vector size, T latent frames.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tokenizer_train.vision.config import LossConfig


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Latents and the codes nearest to them."""

    latents_BDTHW: Tensor
    """What the encoder says."""

    codes_BTHW: Tensor
    """Index of the nearest code."""

    vectors_BDTHW: Tensor
    """The codes' vectors."""

    @property
    def passed_through_BDTHW(self) -> Tensor:
        """The vectors, with the latents' gradient (straight-through estimator, van den Oord et al. 2017)."""
        return self.latents_BDTHW + (self.vectors_BDTHW - self.latents_BDTHW).detach()


def gradient_loss(pixels_CHW: Tensor, target_CHW: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and of vertical pixel differences, summed."""
    error_CHW = pixels_CHW - target_CHW
    return error_CHW.diff(dim=-1).abs().mean() + error_CHW.diff(dim=-2).abs().mean()


def tokenizer_loss(
    pixels_CHW: Tensor, target_CHW: Tensor, quantized: Quantized | None, weights: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum, and every unweighted term by name; without `quantized` only those of the pixels."""
    terms = {
        "l1": F.l1_loss(pixels_CHW, target_CHW),
        "l2": F.mse_loss(pixels_CHW, target_CHW),
        "gradient": gradient_loss(pixels_CHW, target_CHW),
    }
    if quantized is not None:
        terms["codebook"] = F.mse_loss(quantized.vectors_BDTHW, quantized.latents_BDTHW.detach())
        terms["commitment"] = F.mse_loss(quantized.latents_BDTHW, quantized.vectors_BDTHW.detach())
    loss = sum(getattr(weights, name) * term for name, term in terms.items())
    return loss, terms

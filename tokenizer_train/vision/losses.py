"""Losses of a vision tokenizer: functions of tensors, every one a mean over all its numbers.

Means of equal parts compose: the mean over ranks and micro-batches of a loss is the loss of the whole batch.

Those between latents and codes are in quantize_loss.py.

Shapes: ... any leading axes, C colour channels, H W pixels.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer_train.vision.config import LossConfig

PERCEPTUAL_TERMS = ("lpips_vgg16", "efficientnet_lite0")
QUANTIZER_TERMS = ("codebook", "commitment", "index_propagation", "entropy")
TERMS = ("l1", "l2", "gradient", *PERCEPTUAL_TERMS, "adversarial", *QUANTIZER_TERMS)
"""Names of all terms: fields of LossConfig, `loss_NAME` and `weight_NAME` in the metrics."""

ADAPTIVE_EPS = 1e-4
ADAPTIVE_LIMIT = 1e4


def weights_at(config: LossConfig, step: int) -> dict[str, float]:
    """The weight with which each term acts at `step` (the first is 1); 0 before a term's start."""
    starts = dict.fromkeys(PERCEPTUAL_TERMS, config.perceptual_start_step)
    starts["adversarial"] = config.adversarial_start_step
    return {name: getattr(config, name) if step > starts.get(name, 0) else 0.0 for name in TERMS}


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float | Tensor]) -> Tensor:
    """The terms times their weights, added; a term without a weight is an error (KeyError)."""
    return sum(weights[name] * term for name, term in terms.items())


def pixel_terms(pixels_CHW: Tensor, target_CHW: Tensor) -> dict[str, Tensor]:
    """The terms that compare pixels."""
    return {
        "l1": F.l1_loss(pixels_CHW, target_CHW),
        "l2": F.mse_loss(pixels_CHW, target_CHW),
        "gradient": gradient_loss(pixels_CHW, target_CHW),
    }


def gradient_loss(pixels_CHW: Tensor, target_CHW: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and of vertical pixel differences, summed."""
    error_CHW = pixels_CHW - target_CHW
    return error_CHW.diff(dim=-1).abs().mean() + error_CHW.diff(dim=-2).abs().mean()


def adversarial_loss(drawn_scores: Tensor) -> Tensor:
    """What the tokenizer wants of the discriminator's scores of what it drew: that they are high (hinge GAN)."""
    return -drawn_scores.mean()


def discriminator_loss(real_scores: Tensor, drawn_scores: Tensor) -> Tensor:
    """Half of how far real patches score below 1 plus how far drawn ones score above -1 (Lim and Ye 2017).

    The half is SBER's (movqgan/modules/losses/vqperceptual.py:19-24).
    """
    return 0.5 * (F.relu(1.0 - real_scores).mean() + F.relu(1.0 + drawn_scores).mean())


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """Ratio of two gradients' lengths: with it the adversarial loss pulls as hard as the reconstruction does.

    Both are with respect to the decoder's last kernel (Esser et al. 2021, equation 7; epsilon and limit from
    taming-transformers' taming/modules/losses/vqperceptual.py:calculate_adaptive_weight).
    """
    norms = torch.linalg.vector_norm(reconstruction_gradient), torch.linalg.vector_norm(adversarial_gradient)
    return (norms[0] / (norms[1] + ADAPTIVE_EPS)).clamp(max=ADAPTIVE_LIMIT)

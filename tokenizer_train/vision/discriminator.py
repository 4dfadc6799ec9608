"""Networks that tell drawn pictures and clips from real ones, patch by patch.

Shapes: N pictures, B clips, T frames, C colour channels, H W pixels, h w patches.
"""

import itertools

import torch
from torch import Tensor, nn

from megatron_ext.config import InputError
from tokenizer_train.vision.config import DiscriminatorConfig

KERNEL = 4
SLOPE = 0.2
MAX_WIDENING = 8
INITIAL_DEVIATION = 0.02
GROUPS = 32


class PatchGAN(nn.Module):
    """A number for every patch: positive where it looks real (Isola et al. 2017, appendix 6.1.2).

    Layers, widths, slope and initial weights are those of SBER's MoVQGAN (movqgan/modules/discriminator/model.py): a
    strided convolution, `num_layers - 1` strided ones with a norm, one of stride 1 with a norm, one to a single number.
    For clips every kernel also spans 3 frames, with no stride in time, so that a clip of any length is judged frame by
    frame, each in view of its neighbours: ours, there is no published one of Emu3.
    """

    def __init__(self, config: DiscriminatorConfig, *, clips: bool) -> None:
        super().__init__()
        self._min_side = 3 * 2**config.num_layers  # the two layers of stride 1 take one patch each
        self._clips = clips
        widths = [config.width * min(2**level, MAX_WIDENING) for level in range(config.num_layers + 1)]
        layers = [_conv(3, widths[0], 2, clips, bias=True), nn.LeakyReLU(SLOPE, inplace=True)]
        for level, (narrow, wide) in enumerate(itertools.pairwise(widths), start=1):
            stride = 2 if level < config.num_layers else 1
            # The batch norm's own shift makes a bias idle.
            layers.append(_conv(narrow, wide, stride, clips, bias=config.norm != "batch"))
            layers += [_norm(config.norm, wide, clips), nn.LeakyReLU(SLOPE, inplace=True)]
        layers.append(_conv(widths[-1], 1, 1, clips, bias=True))
        self.layers = nn.Sequential(*layers)
        self.apply(_initialize)

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores [N, 1, h, w] of pictures [N, C, H, W], or [B, 1, T, h, w] of clips [B, T, C, H, W].

        Raises:
            InputError: too few pixels for one patch.
        """
        if min(pixels.shape[-2:]) < self._min_side:
            raise InputError(
                f"frames of {pixels.shape[-2]}x{pixels.shape[-1]} pixels: discriminator.num_layers asks for at least "
                f"{self._min_side} a side; lower it"
            )
        return self.layers(pixels.transpose(1, 2) if self._clips else pixels)


class Discriminator(nn.Module):
    """One network for pictures, and one for clips where there are any."""

    def __init__(self, config: DiscriminatorConfig, *, clip_share: float) -> None:
        super().__init__()
        self.pictures = PatchGAN(config, clips=False) if clip_share < 1 else None
        self.clips = PatchGAN(config, clips=True) if clip_share > 0 else None

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores of pictures [N, C, H, W] or clips [B, T, C, H, W], as PatchGAN's."""
        return (self.pictures if pixels.ndim == 4 else self.clips)(pixels)


def _conv(channels: int, width: int, stride: int, clips: bool, *, bias: bool) -> nn.Module:
    if clips:
        return nn.Conv3d(channels, width, (3, KERNEL, KERNEL), stride=(1, stride, stride), padding=1, bias=bias)
    return nn.Conv2d(channels, width, KERNEL, stride=stride, padding=1, bias=bias)


def _norm(name: str, width: int, clips: bool) -> nn.Module:
    if name == "group":
        return nn.GroupNorm(min(GROUPS, width), width)
    return nn.BatchNorm3d(width) if clips else nn.BatchNorm2d(width)


@torch.no_grad()
def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.normal_(module.weight, 0.0, INITIAL_DEVIATION)
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, INITIAL_DEVIATION)

"""Initial weights from which a short training gets far: the network starts near the identity.

Every residual branch adds nothing, the temporal layers pass on their newest frame, the conditioned norms are plain
norms. The graph and the names are Emu3's; only the numbers differ.
"""

import torch
from torch import nn

from megatron_ext.vision import MoVQGAN
from megatron_ext.vision.blocks import (
    AttentionBlock,
    CausalConv3d,
    ResnetBlock,
    SpatialNorm,
    TemporalDownsample,
    TemporalResBlock,
    TemporalUpsample,
)

# SiLU halves what is near zero; around +1 it is close to a line. Two of them on the few latent channels would otherwise
# destroy the signal. silu(silu(0 + 1) + 1) = 1.6 is taken off again before the quantiser.
SILU_OFFSET = 1.0
TWICE_SILU_OF_OFFSET = 1.6
SMALL = 0.02
CONDITION_SCALE = 0.1
OUTPUT_SCALE = 0.3
# Brings the 2D latents to a deviation of about 0.6, where the two SiLUs are still close to lines. At 2.4, where they
# would start, half of the channels end up in the flat part and the codes have fewer dimensions than they could.
LATENT_SCALE = 0.25


@torch.no_grad()
def near_identity(model: MoVQGAN) -> None:
    """Set the weights of a freshly made `model`."""
    for module in model.modules():
        if isinstance(module, ResnetBlock):
            _zero(module.conv2)
        elif isinstance(module, TemporalResBlock):
            _zero(module.conv2.conv)
        elif isinstance(module, AttentionBlock):
            _zero(module.proj_out)
        elif isinstance(module, SpatialNorm):
            for conv, bias in ((module.conv_y, 1.0), (module.conv_b, 0.0)):
                nn.init.normal_(conv.weight, std=CONDITION_SCALE)
                nn.init.constant_(conv.bias, bias)
        elif isinstance(module, TemporalDownsample | TemporalUpsample):
            _newest_frame(module.conv, noise=SMALL, bias=SILU_OFFSET)
    # Without temporal layers (factor 1) there is no SiLU to make up for.
    shift = -TWICE_SILU_OF_OFFSET if model.config.num_time_convs else 0.0
    _newest_frame(model.quant_conv, noise=0.0, bias=shift)
    _newest_frame(model.post_quant_conv, noise=0.0, bias=0.0)
    model.encoder.conv_out.weight.mul_(LATENT_SCALE)
    model.decoder.conv_out.weight.mul_(OUTPUT_SCALE)


def _zero(conv: nn.Conv2d | nn.Conv3d) -> None:
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)


def _newest_frame(conv: CausalConv3d, *, noise: float, bias: float) -> None:
    """Each output channel is its input channel in the newest frame of the window, plus noise."""
    weight_OITHW = conv.conv.weight
    nn.init.normal_(weight_OITHW, std=noise) if noise else nn.init.zeros_(weight_OITHW)
    height, width = weight_OITHW.shape[-2:]
    centre_OI = weight_OITHW[:, :, -1, height // 2, width // 2]
    centre_OI += torch.eye(centre_OI.shape[0], device=centre_OI.device)
    nn.init.constant_(conv.conv.bias, bias)

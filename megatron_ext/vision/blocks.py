"""Layers of the Emu3 vision tokenizer, 2D per frame and causal 3D over time, under the names of BAAI's checkpoint.

Shapes: B batch, N frames of a whole batch, T frames in time, C channels, H W grid; Z channels of the quantised map.
Source: github.com/baaivision/Emu3 emu3/tokenizer/modeling_emu3visionvq.py, cited as E3 with line numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_GROUPS = 32  # hard-wired upstream (E3:225-233) and in transformers' class: every width is a multiple of it
NORM_EPS = 1e-6


class Norm(nn.GroupNorm):
    """Group norm of the 2D networks, with SpatialNorm's signature, so that encoder and decoder share their blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__(NUM_GROUPS, channels, eps=NORM_EPS)

    def forward(self, x_NCHW: Tensor, zq_NZhw: Tensor | None = None) -> Tensor:
        return super().forward(x_NCHW)


class SpatialNorm(nn.Module):
    """Group norm whose scale and shift are 1x1 convolutions of the quantised map (MoVQ; E3:202-233)."""

    def __init__(self, channels: int, condition_channels: int) -> None:
        super().__init__()
        self.norm_layer = Norm(channels)
        self.conv_y = nn.Conv2d(condition_channels, channels, 1)
        self.conv_b = nn.Conv2d(condition_channels, channels, 1)

    def forward(self, x_NCHW: Tensor, zq_NZhw: Tensor) -> Tensor:
        """Upstream enlarges zq before the convolutions; 1x1 convolutions commute with nearest resizing, and the
        small grid costs less."""
        size = x_NCHW.shape[-2:]
        scale = F.interpolate(self.conv_y(zq_NZhw), size=size, mode="nearest")
        shift = F.interpolate(self.conv_b(zq_NZhw), size=size, mode="nearest")
        return torch.addcmul(shift, self.norm_layer(x_NCHW), scale)


def _norm(channels: int, condition_channels: int | None) -> nn.Module:
    return Norm(channels) if condition_channels is None else SpatialNorm(channels, condition_channels)


class ResnetBlock(nn.Module):
    """norm, SiLU, conv3, norm, SiLU, conv3, plus the input (1x1 `nin_shortcut` when the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, condition_channels: int | None = None) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, condition_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, condition_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.changes_width = in_channels != out_channels

    def forward(self, x_NCHW: Tensor, zq_NZhw: Tensor | None = None) -> Tensor:
        h_NCHW = self.conv1(F.silu(self.norm1(x_NCHW, zq_NZhw)))
        h_NCHW = self.conv2(F.silu(self.norm2(h_NCHW, zq_NZhw)))
        return h_NCHW + (self.nin_shortcut(x_NCHW) if self.changes_width else x_NCHW)


class AttentionBlock(nn.Module):
    """Attention of one head over all positions of one frame, scale C^-0.5, plus the input (E3:367-390)."""

    def __init__(self, channels: int, condition_channels: int | None = None) -> None:
        super().__init__()
        self.norm = _norm(channels, condition_channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_NCHW: Tensor, zq_NZhw: Tensor | None = None) -> Tensor:
        h_NCHW = self.norm(x_NCHW, zq_NZhw)
        q_N1SC, k_N1SC, v_N1SC = (conv(h_NCHW).flatten(2).mT.unsqueeze(1) for conv in (self.q, self.k, self.v))
        context_N1SC = F.scaled_dot_product_attention(q_N1SC, k_N1SC, v_N1SC)
        return x_NCHW + self.proj_out(context_N1SC.squeeze(1).mT.reshape(x_NCHW.shape))


class Downsample(nn.Module):
    """Half the grid: one zero column right and one zero row below, then conv3 with stride 2 (E3:55-72)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_NCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the grid: nearest, then conv3 (E3:37-52)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_NCHW, scale_factor=2.0, mode="nearest"))


class MiddleBlock(nn.Module):
    """Block, attention, block at the coarsest grid."""

    def __init__(self, channels: int, condition_channels: int | None = None) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, condition_channels)
        self.attn_1 = AttentionBlock(channels, condition_channels)
        self.block_2 = ResnetBlock(channels, channels, condition_channels)

    def forward(self, x_NCHW: Tensor, zq_NZhw: Tensor | None = None) -> Tensor:
        x_NCHW = self.block_1(x_NCHW, zq_NZhw)
        return self.block_2(self.attn_1(x_NCHW, zq_NZhw), zq_NZhw)


class CausalConv3d(nn.Module):
    """3D convolution that sees no later frame: two zero frames before, symmetric zeros in space (E3:74-106)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], time_stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(
            in_channels, out_channels, kernel, stride=(time_stride, 1, 1), padding=(0, kernel[1] // 2, kernel[2] // 2)
        )

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCTHW, (0, 0, 0, 0, 2, 0)))


class TemporalDownsample(nn.Module):
    """Half the frames: causal convolution of kernel (4, 3, 3), stride 2 in time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (4, 3, 3), time_stride=2)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.conv(x_BCTHW)


class TemporalUpsample(nn.Module):
    """Twice the frames: each frame repeated, then a causal convolution of kernel (3, 3, 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (3, 3, 3))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.conv(x_BCTHW.repeat_interleave(2, dim=2))


class TemporalResBlock(nn.Module):
    """Batch norm, SiLU, causal conv, twice, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv1 = CausalConv3d(channels, channels, (3, 3, 3))
        self.norm2 = nn.BatchNorm3d(channels)
        self.conv2 = CausalConv3d(channels, channels, (3, 3, 3))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        h_BCTHW = self.conv1(F.silu(self.norm1(x_BCTHW)))
        return x_BCTHW + self.conv2(F.silu(self.norm2(h_BCTHW)))

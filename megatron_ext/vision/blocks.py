"""Layers of the Emu3 vision tokenizer, 2D per frame and causal 3D over time, under the names of BAAI's checkpoint.

What is fast here, and exact: weights and maps of the 2D networks lie channels last, which spares convolutions on CPUs
their reordering; nothing of the size of a map is made twice where no gradient is wanted, because at high resolution
fresh memory costs as much time as the arithmetic.

Shapes: B batch, N frames of a whole batch, T frames in time, C channels, G groups of them, H W grid, h w grid of
codes; Z channels of the quantised map.
Source: github.com/baaivision/Emu3 emu3/tokenizer/modeling_emu3visionvq.py, cited as E3 with line numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_GROUPS = 32  # hard-wired upstream (E3:225-233) and in transformers' class: every width is a multiple of it
NORM_EPS = 1e-6
CAUSAL_FRAMES = 2
"""Frames before the present one that a causal convolution sees, whatever its kernel (E3:74-106)."""

Past = dict["CausalConv3d", Tensor]
"""The last CAUSAL_FRAMES input frames of each causal convolution: what a stream remembers of its clip."""


BAND_ELEMENTS = 1 << 18
"""Numbers of a map whose squares are summed together, at most an eighth of it: they are read again while they are in a
core's cache, and cost no memory to speak of."""


class Norm(nn.GroupNorm):
    """Group norm of the 2D networks, with SpatialNorm's signature, so that encoder and decoder share their blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__(NUM_GROUPS, channels, eps=NORM_EPS)

    def forward(self, x_NCHW: Tensor, zq_NZhw: Tensor | None = None) -> Tensor:
        # torch's kernel for channels-last maps on a CPU adds x and x^2 of all pixels in one fp32 number each and takes
        # E[x^2] - E[x]^2 for the variance: at 512 x 512 up to one code in twenty becomes another. Its backward pass
        # takes 50 times as long as that of plain maps. On a GPU the forward pass makes maps plain anyway.
        if torch.is_grad_enabled():
            return super().forward(x_NCHW.contiguous())
        return self._of_channels_last(x_NCHW) if x_NCHW.device.type == "cpu" else super().forward(x_NCHW)

    def _of_channels_last(self, x_NCHW: Tensor) -> Tensor:
        """The norm in two passes: the variance is the mean of squared distances to the mean."""
        exact = x_NCHW.to(torch.promote_types(x_NCHW.dtype, torch.float32))
        batch, channels, height, width = exact.shape
        mean_NC11 = self._per_group(exact.mean((2, 3)))
        normed = torch.empty_like(exact)
        squares_NC = exact.new_zeros(batch, channels)
        rows = max(1, min(BAND_ELEMENTS // (batch * channels * width), height // 8))
        for band, out in zip(exact.split(rows, 2), normed.split(rows, 2), strict=True):
            torch.sub(band, mean_NC11, out=out)
            squares_NC += out.square().sum((2, 3))
        variance_NC11 = self._per_group(squares_NC / (height * width))
        weight_C, bias_C = (parameter[:, None, None].to(exact.dtype) for parameter in (self.weight, self.bias))
        torch.addcmul(bias_C, normed, (variance_NC11 + self.eps).rsqrt() * weight_C, out=normed)
        return normed.to(x_NCHW.dtype)

    def _per_group(self, x_NC: Tensor) -> Tensor:
        """[N, C, 1, 1]: for each channel the mean over its group's channels."""
        groups_NG1 = x_NC.unflatten(1, (self.num_groups, -1)).mean(2, keepdim=True)
        return groups_NG1.expand(-1, -1, x_NC.shape[1] // self.num_groups).reshape(*x_NC.shape, 1, 1)


class SpatialNorm(nn.Module):
    """Group norm whose scale and shift are 1x1 convolutions of the quantised map (MoVQ; E3:202-233)."""

    def __init__(self, channels: int, condition_channels: int) -> None:
        super().__init__()
        self.norm_layer = Norm(channels)
        self.conv_y = nn.Conv2d(condition_channels, channels, 1)
        self.conv_b = nn.Conv2d(condition_channels, channels, 1)

    def forward(self, x_NCHW: Tensor, zq_NZhw: Tensor) -> Tensor:
        """Upstream enlarges zq before the convolutions; 1x1 convolutions commute with nearest resizing, and the small
        grid costs less. Without gradient its values are broadcast to their pixels instead of being copied there."""
        scale, shift = self.conv_y(zq_NZhw), self.conv_b(zq_NZhw)
        if torch.is_grad_enabled():  # sums over broadcast pixels are slower backwards than those of interpolate
            size = x_NCHW.shape[-2:]
            scale, shift = (F.interpolate(x, size=size, mode="nearest") for x in (scale, shift))
            return torch.addcmul(shift, self.norm_layer(x_NCHW), scale)
        cells = [pixels // codes for pixels, codes in zip(x_NCHW.shape[-2:], zq_NZhw.shape[-2:], strict=True)]
        normed = self.norm_layer(x_NCHW).unflatten(3, (-1, cells[1])).unflatten(2, (-1, cells[0]))
        scale, shift = (x.unsqueeze(3).unsqueeze(5) for x in (scale, shift))
        torch.addcmul(shift, normed, scale, out=normed)
        return normed.flatten(4, 5).flatten(2, 3)


def _norm(channels: int, condition_channels: int | None) -> nn.Module:
    return Norm(channels) if condition_channels is None else SpatialNorm(channels, condition_channels)


def activated(norm: nn.Module, x: Tensor, *condition: Tensor | None) -> Tensor:
    """SiLU of the normalised `x`."""
    return F.silu(norm(x, *condition), inplace=not torch.is_grad_enabled())


def _sum(fresh: Tensor, kept: Tensor) -> Tensor:
    """fresh + kept; into the memory of `fresh`, which nobody else holds, where no gradient is wanted."""
    return fresh + kept if torch.is_grad_enabled() else fresh.add_(kept)


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
        h_NCHW = self.conv1(activated(self.norm1, x_NCHW, zq_NZhw))
        h_NCHW = activated(self.norm2, h_NCHW, zq_NZhw)  # a name for itself: what it normalises is free before conv2
        h_NCHW = self.conv2(h_NCHW)
        return _sum(h_NCHW, self.nin_shortcut(x_NCHW) if self.changes_width else x_NCHW)


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
        return _sum(self.proj_out(context_N1SC.squeeze(1).mT.reshape(x_NCHW.shape)), x_NCHW)


class Downsample(nn.Module):
    """Half the grid: one zero column right and one zero row below, then conv3 with stride 2 (E3:55-72)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_NCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the grid: nearest, then conv3 (E3:37-52), as four 2x2 convolutions of the small grid.

    Each pixel of a 2x2 cell sees four source pixels, some through several of the nine taps; adding those taps first
    takes 4/9 of the multiplications and never makes the enlarged map. Only the rounding differs.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        rows_NHWbC = [torch.stack([self._quarter(x_NCHW, row, column) for column in (0, 1)], dim=3) for row in (0, 1)]
        return torch.stack(rows_NHWbC, dim=2).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)

    def _quarter(self, x_NCHW: Tensor, row: int, column: int) -> Tensor:
        """Pixels [N, H, W, C] of all cells' place (row, column)."""
        height, width = x_NCHW.shape[-2:]
        # The sums are rounded once, also where the weights are bf16.
        taps = self.conv.weight.to(torch.promote_types(self.conv.weight.dtype, torch.float32))
        for dim, place in ((2, row), (3, column)):
            before, same, after = taps.split(1, dim)
            taps = torch.cat((before, same + after) if place == 0 else (before + same, after), dim)
        taps = taps.to(self.conv.weight.dtype, memory_format=torch.channels_last)
        padded_NCHW = F.conv2d(x_NCHW, taps, self.conv.bias, padding=1)
        return padded_NCHW[:, :, row : row + height, column : column + width].permute(0, 2, 3, 1)


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
    """3D convolution that sees no later frame: zero frames before, symmetric zeros in space (E3:74-106)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], time_stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(
            in_channels, out_channels, kernel, stride=(time_stride, 1, 1), padding=(0, kernel[1] // 2, kernel[2] // 2)
        )

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        """With `past`, the frames before are those of the last call with it (zeros in the first)."""
        if past is not None and self in past:
            x_BCTHW = torch.cat((past[self], x_BCTHW), dim=2)
        else:
            x_BCTHW = F.pad(x_BCTHW, (0, 0, 0, 0, CAUSAL_FRAMES, 0))
        if past is not None:
            past[self] = x_BCTHW[:, :, -CAUSAL_FRAMES:].clone()  # a view would keep the whole piece
        return self.conv(x_BCTHW)


class TemporalDownsample(nn.Module):
    """Half the frames: causal convolution of kernel (4, 3, 3), stride 2 in time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (4, 3, 3), time_stride=2)

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        return self.conv(x_BCTHW, past)


class TemporalUpsample(nn.Module):
    """Twice the frames: each frame repeated, then a causal convolution of kernel (3, 3, 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (3, 3, 3))

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        return self.conv(x_BCTHW.repeat_interleave(2, dim=2), past)


class TemporalResBlock(nn.Module):
    """Batch norm, SiLU, causal conv, twice, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv1 = CausalConv3d(channels, channels, (3, 3, 3))
        self.norm2 = nn.BatchNorm3d(channels)
        self.conv2 = CausalConv3d(channels, channels, (3, 3, 3))

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        h_BCTHW = self.conv1(activated(self.norm1, x_BCTHW), past)
        return x_BCTHW + self.conv2(activated(self.norm2, h_BCTHW), past)

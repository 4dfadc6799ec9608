"""How the tokenizer's 2D networks, which are nearly all of its work, are executed: what is kept for the backward pass,
what is compiled. Neither changes the names of the weights.

Shapes: N frames of a batch, C channels, H W grid of the tensor at hand.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ext.config import InputError
from megatron_ext.vision import MoVQGAN
from megatron_ext.vision.blocks import AttentionBlock, ResnetBlock


def compile_networks(model: MoVQGAN, precision: str) -> None:
    """Let torch.compile fuse the 2D encoder and decoder; each size of frames is compiled when it first comes.

    Raises:
        InputError: bf16 on a CPU. There torch 2.13 compiles a backward pass in which most kernels of convolutions
            get a gradient of exactly zero (backend inductor; aot_eager and fp32 are right).
    """
    if precision == "bf16" and next(model.parameters()).device.type == "cpu":
        raise InputError(
            "train.compile = true with train.precision = 'bf16' on a CPU: torch compiles wrong gradients there; set "
            "train.compile to false, or train.precision to fp32"
        )
    model.encoder.frames = torch.compile(model.encoder.frames)
    model.decoder.frames = torch.compile(model.decoder.frames)


def recompute_blocks(model: MoVQGAN, min_side: int) -> None:
    """Keep only the inputs of the 2D blocks for the backward pass of frames with at least `min_side`^2 pixels, and
    compute the rest again there (activation checkpointing, Chen et al. 2016).

    The temporal blocks are left alone: they are small, and their batch norms would count every batch twice.
    """
    factor = model.config.spatial_factor
    for network, scale in ((model.encoder, 1), (model.decoder, factor)):
        _Recomputed(network, min_pixels=min_side**2, pixels_per_place=scale**2)


class _Recomputed:
    """Makes one 2D network forget what its blocks computed, while its frames are large."""

    def __init__(self, network: nn.Module, *, min_pixels: int, pixels_per_place: int) -> None:
        self._frames = network.frames
        self._min_places = min_pixels / pixels_per_place
        self._is_large = False
        network.frames = self._note_size
        for block in network.modules():
            if isinstance(block, ResnetBlock | AttentionBlock):
                block.forward = functools.partial(self._run, block.forward)

    def _note_size(self, x_NCHW: Tensor, *condition: Tensor) -> Tensor:
        self._is_large = x_NCHW.shape[-2] * x_NCHW.shape[-1] >= self._min_places
        return self._frames(x_NCHW, *condition)

    def _run(self, forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if self._is_large and torch.is_grad_enabled():
            return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)
        return forward(*inputs)

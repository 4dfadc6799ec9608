"""Oracle: transformers' Emu3VQVAE with the same weights gives the same codes and pixels.

The renaming is written out here, independent of the product's conversion table.
"""

import re

import pytest
import torch
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from megatron_ext.vision import MoVQGAN, VisionTokenizerConfig

CONFIGS = {
    "three stages, factor 4": VisionTokenizerConfig(
        codebook_size=512, ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(2,)
    ),
    "four stages, factor 8": VisionTokenizerConfig(
        codebook_size=512, ch=32, ch_mult=(1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(3,)
    ),
}

LARGE_MAPS = VisionTokenizerConfig(
    codebook_size=2048,
    ch=32,
    ch_mult=(1, 1, 1, 1),
    num_res_blocks=1,
    attn_resolutions=(),
    temporal_downsample_factor=1,
)
"""Emu3's stages in as many channels as there are groups; of one frame, to be quick."""


def transformers_name(name: str) -> str:
    """The tensor's name in transformers."""
    name = re.sub(r"\.mid\.attn_1\.norm\b", ".middle_block.attn_norm", name)
    name = re.sub(r"\.attn\.(\d+)\.norm\b", r".attn_norms.\1", name)
    if ".attn" in name:
        name = re.sub(r"\.proj_out\.", ".out_proj.", re.sub(r"\.([qkv])\.(weight|bias)$", r".\1_proj.\2", name))
    for ours, theirs in ((".down.", ".down_block.down."), (".up.", ".up_block.up."), (".mid.", ".middle_block.")):
        name = name.replace(ours, theirs)
    return name


def pair(config: VisionTokenizerConfig, *, is_lively: bool = False) -> tuple[MoVQGAN, Emu3VQVAE]:
    """Our random model, its codebook as wide as its latents, and transformers' with a copy of the weights.

    `is_lively` gives norms and biases values as far from their initial ones as training does.
    """
    torch.manual_seed(0)
    ours = MoVQGAN(config).eval()
    with torch.no_grad():
        for name, tensor in ours.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif name.endswith(("running_mean", "bias")):
                tensor.normal_(std=1.0 if is_lively else 0.1)
            elif is_lively and name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "norm_out.weight")):
                tensor.uniform_(0.5, 2.0)
        latents = ours.latents(torch.rand(4, 3, 32, 32) * 2 - 1)
        ours.quantize.embedding.weight.normal_().mul_(latents.std()).add_(latents.mean())
        ours.decoder.conv_out.weight.mul_(0.1)  # random pixels of order one, not ten
    theirs = Emu3VQVAE(
        Emu3VQVAEConfig(
            codebook_size=config.codebook_size,
            embed_dim=config.embed_dim,
            latent_channels=config.z_channels,
            temporal_downsample_factor=config.temporal_downsample_factor,
            base_channels=config.ch,
            channel_multiplier=list(config.ch_mult),
            num_res_blocks=config.num_res_blocks,
            attn_resolutions=list(config.attn_resolutions),
            hidden_size=config.widths[-1],
        )
    ).eval()
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    renamed = {transformers_name(name): tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict({name: tensor.reshape(shapes[name]) for name, tensor in renamed.items()})
    return ours, theirs


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_codes_equal_and_pixels_close(config):
    ours, theirs = pair(config)
    side = 8 * config.spatial_factor
    for media in (torch.rand(3, 3, side, side) * 2 - 1, torch.rand(2, 8, 3, side, side) * 2 - 1):
        codes = ours.encode(media)
        expected = theirs.encode(media, torch.tensor([[side, side]] * len(media))).image_tokens
        assert codes.unique().numel() > 40, "too few codes in use for the comparison to mean anything"
        assert torch.equal(codes, torch.stack(expected))
        pixels, expected_pixels = ours.decode(codes), theirs.decode(codes)
        # Measured: at most 3e-5 in float32, 2e-14 in float64: the two round differently, nothing else.
        assert (pixels - expected_pixels).abs().max() < 1e-4
        double = (ours.double().decode(codes) - theirs.double().decode(codes)).abs().max()
        print(f"codes {codes.unique().numel()}, {(pixels - expected_pixels).abs().max():.1e}, double {double:.1e}")
        assert double < 1e-11
        ours.float(), theirs.float()


@pytest.mark.parametrize("size", [(512, 512), (328, 504)])
@torch.no_grad()
def test_codes_of_large_maps(size):
    """Sums over many pixels lose digits; the norms' must not, where the mean of a group is far from zero."""
    ours, theirs = pair(LARGE_MAPS, is_lively=True)
    pixels = torch.rand(1, 3, *size) * 0.4 + 0.5
    codes = ours.encode(pixels)
    expected = torch.stack(theirs.encode(pixels, torch.tensor([size])).image_tokens)
    different = int((codes != expected).sum())
    print(f"{different} of {codes.numel()} codes differ, {codes.unique().numel()} are in use")
    assert codes.unique().numel() > 100, "too few codes in use for the comparison to mean anything"
    # Measured 0; with torch's norm of channels-last maps 53 of 4,096 and 20 of 2,583.
    assert different <= 2

"""The exported vision tokenizer in transformers: the same codes, the same pixels, through the product's own table."""

import pytest
import torch
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from megatron_ext.hf import vision_tensors
from megatron_ext.hf.vision import vq_config
from megatron_ext.vision import MoVQGAN
from tests.support.releases import whole
from tests.support.small_models import VISION


@pytest.fixture(scope="module")
def pair() -> tuple[MoVQGAN, Emu3VQVAE]:
    """Ours with random weights and a codebook as wide as its latents; theirs with the converted weights."""
    torch.manual_seed(0)
    ours = MoVQGAN(VISION).eval()
    with torch.no_grad():
        for name, tensor in ours.state_dict().items():
            if "norm" in name and tensor.is_floating_point() and tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
        latents = ours.latents(torch.rand(4, 3, 64, 64) * 2 - 1).movedim(1, -1).reshape(-1, VISION.embed_dim)
        ours.quantize.embedding.weight.copy_(latents[torch.randperm(len(latents))[: VISION.codebook_size]])
        ours.decoder.conv_out.weight.mul_(0.1)  # pixels of order one, not ten
    theirs = Emu3VQVAE(Emu3VQVAEConfig(**vq_config(VISION))).eval()
    theirs.load_state_dict(whole(vision_tensors(ours)))
    return ours, theirs


def test_codes_and_pixels_of_pictures(pair: tuple[MoVQGAN, Emu3VQVAE]) -> None:
    ours, theirs = pair
    pixels = torch.rand(2, 3, 64, 48) * 2 - 1
    codes = ours.encode(pixels)
    assert len(codes.unique()) > 4
    expected = theirs.encode(pixels, image_sizes=torch.tensor([[64, 48]] * 2), return_dict=True).image_tokens
    assert torch.equal(codes, torch.stack(expected))
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(codes), theirs.decode(codes), atol=1e-4, rtol=0)  # measured 5e-6


def test_codes_and_pixels_of_clips(pair: tuple[MoVQGAN, Emu3VQVAE]) -> None:
    ours, theirs = pair
    pixels = torch.rand(1, 8, 3, 32, 32) * 2 - 1
    codes = ours.encode(pixels)
    with torch.no_grad():
        expected = theirs.quantize(
            theirs.quant_conv(theirs.encoder(pixels).permute(0, 2, 1, 3, 4)).permute(0, 2, 1, 3, 4)
        )
        assert torch.equal(codes, expected)
        torch.testing.assert_close(ours.decode(codes), theirs.decode(codes), atol=1e-4, rtol=0)  # measured 4e-6

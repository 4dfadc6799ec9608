"""Initial weights, codebook care and evaluation of the vision tokenizer's training."""

import numpy as np
import pytest
import torch

from megatron_ext.vision import MoVQGAN, VisionTokenizerConfig
from tokenizer_train.vision.codebook import perplexity
from tokenizer_train.vision.initialize import near_identity
from tokenizer_train.vision.quality import psnr


def test_near_identity_passes_the_signal():
    torch.manual_seed(0)
    config = VisionTokenizerConfig(codebook_size=8, ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(2,))
    model = MoVQGAN(config).eval()
    near_identity(model)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        spatial = model.encoder.frames(pixels)
        latents = model.latents(pixels)[:, :, 0]
        expected = torch.nn.functional.silu(torch.nn.functional.silu(spatial + 1) + 1) - 1.6
        # 0.02 of noise on 4 x 36 taps: differences of a few tenths against a spread of about one.
        assert (latents - expected).abs().mean() < 0.3 * expected.std()
        one_block = model.decoder.up[0].block[1]
        hidden, condition = torch.randn(2, 32, 16, 16), torch.randn(2, 4, 4, 4)
        assert torch.equal(one_block(hidden, condition), hidden)


def test_perplexity_and_psnr():
    assert perplexity(torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(4)
    assert perplexity(torch.tensor([9, 0])) == pytest.approx(1)
    zeros = np.zeros((2, 2, 3), np.uint8)
    assert psnr(zeros, zeros + 255) == pytest.approx(0)
    assert psnr(zeros, zeros + 1) == pytest.approx(20 * np.log10(255))

"""Losses, initial weights, codebook care and evaluation of the vision tokenizer's training."""

import numpy as np
import pytest
import torch

from megatron_ext.vision import MoVQGAN, VisionTokenizerConfig
from tokenizer_train.vision.codebook import kmeans, perplexity, restart_dead_codes
from tokenizer_train.vision.config import LossConfig
from tokenizer_train.vision.evaluate import psnr
from tokenizer_train.vision.initialize import near_identity
from tokenizer_train.vision.losses import Quantized, gradient_loss, tokenizer_loss


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_losses_by_hand():
    target = torch.zeros(1, 1, 2, 3)
    pixels = torch.tensor([[[[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]]]])
    assert gradient_loss(pixels, target).item() == pytest.approx((1 + 1 + 0 + 2) / 4 + (0 + 1 + 2) / 3)
    latents, vectors = torch.tensor([1.0]).view(1, 1, 1, 1, 1), torch.tensor([3.0]).view(1, 1, 1, 1, 1)
    quantized = Quantized(latents_BDTHW=latents, codes_BTHW=torch.zeros(1, 1, 1, 1), vectors_BDTHW=vectors)
    weights = LossConfig(l1=1, l2=2, gradient=0, codebook=3, commitment=0.5)
    loss, terms = tokenizer_loss(pixels, target, quantized, weights)
    assert loss.item() == pytest.approx(3 / 6 + 2 * 5 / 6 + 3 * 4 + 0.5 * 4)
    assert set(tokenizer_loss(pixels, target, None, weights)[1]) == {"l1", "l2", "gradient"} < set(terms)


def test_gradients_go_where_they_should():
    latents = torch.randn(1, 4, 1, 2, 2, requires_grad=True)
    vectors = torch.randn(1, 4, 1, 2, 2, requires_grad=True)
    quantized = Quantized(latents_BDTHW=latents, codes_BTHW=torch.zeros(1, 1, 2, 2), vectors_BDTHW=vectors)
    assert torch.allclose(quantized.passed_through_BDTHW, vectors)
    weight = torch.randn_like(latents)
    (quantized.passed_through_BDTHW * weight).sum().backward()
    assert torch.equal(latents.grad, weight) and vectors.grad is None
    pixels = torch.zeros(1, 3, 4, 4)
    for name, moved, kept in (("codebook", vectors, latents), ("commitment", latents, vectors)):
        latents.grad = vectors.grad = None
        only = LossConfig(l1=0, l2=0, gradient=0, **({"codebook": 0, "commitment": 0} | {name: 1}))
        tokenizer_loss(pixels, pixels, quantized, only)[0].backward()
        assert moved.grad.abs().sum() > 0 and (kept.grad is None or kept.grad.abs().sum() == 0)


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


def test_kmeans_finds_separate_clusters():
    centres = torch.tensor([[0.0, 0], [10, 10]])
    vectors = (centres[:, None] + torch.randn(2, 50, 2, generator=generator()) * 0.1).flatten(0, 1)
    found = kmeans(vectors, 2, 5, generator(3))
    assert torch.cdist(centres, found).min(1).values.max() < 0.1
    assert torch.equal(found, kmeans(vectors, 2, 5, generator(3)))


def test_kmeans_lowers_the_error_and_leaves_no_code_empty():
    vectors = torch.randn(500, 4, generator=generator())

    def error(codes):
        return torch.cdist(vectors, codes).min(1).values.square().mean()

    errors = [error(kmeans(vectors, 32, iterations, generator(1))) for iterations in (0, 1, 15)]
    assert errors[0] > errors[1] > errors[2]
    nearest = torch.cdist(vectors, kmeans(vectors, 32, 15, generator(1))).argmin(1)
    assert len(nearest.unique()) == 32
    assert kmeans(vectors[:3], 8, 3, generator()).shape == (8, 4), "fewer vectors than codes"


def test_restart_moves_only_dead_codes_and_their_moments():
    embedding = torch.nn.Embedding(6, 2)
    optimizer = torch.optim.AdamW(embedding.parameters())
    embedding.weight.sum().backward()
    optimizer.step()
    before = embedding.weight.detach().clone()
    used = torch.tensor([True, False, True, True, False, True])
    latents = torch.randn(10, 2) + 100
    assert restart_dead_codes(embedding, used, latents, optimizer, generator()) == 2
    assert torch.equal(embedding.weight[used], before[used])
    assert all((row == latents).all(1).any() for row in embedding.weight[~used])
    moment = optimizer.state[embedding.weight]["exp_avg"]
    assert (moment[~used] == 0).all() and (moment[used] != 0).all()
    assert restart_dead_codes(embedding, torch.ones(6, dtype=torch.bool), latents, optimizer, generator()) == 0


def test_perplexity_and_psnr():
    assert perplexity(torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(4)
    assert perplexity(torch.tensor([9, 0])) == pytest.approx(1)
    zeros = np.zeros((2, 2, 3), np.uint8)
    assert psnr(zeros, zeros + 255) == pytest.approx(0)
    assert psnr(zeros, zeros + 1) == pytest.approx(20 * np.log10(255))

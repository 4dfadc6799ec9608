"""Terms of the loss by hand, where their gradients go, and the step from which each weight acts."""

import typing

import pytest
import torch

from megatron_ext.config import InputError, load
from tokenizer_train.vision.config import DiscriminatorConfig, LossConfig, VisionTokenizerTrainingConfig
from tokenizer_train.vision.losses import (
    PERCEPTUAL_TERMS,
    TERMS,
    adaptive_weight,
    adversarial_loss,
    discriminator_loss,
    gradient_loss,
    pixel_terms,
    weighted_sum,
    weights_at,
)
from tokenizer_train.vision.quantize_loss import Quantized, quantizer_terms


def test_losses_by_hand():
    target = torch.zeros(1, 1, 2, 3)
    pixels = torch.tensor([[[[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]]]])
    assert gradient_loss(pixels, target).item() == pytest.approx((1 + 1 + 0 + 2) / 4 + (0 + 1 + 2) / 3)
    latents, vectors = torch.tensor([1.0]).view(1, 1, 1, 1, 1), torch.tensor([3.0]).view(1, 1, 1, 1, 1)
    quantized = Quantized(latents_BDTHW=latents, codes_BTHW=torch.zeros(1, 1, 1, 1), vectors_BDTHW=vectors)
    weights = LossConfig(l1=1, l2=2, gradient=0, codebook=3, commitment=0.5)
    terms = pixel_terms(pixels, target) | quantizer_terms(quantized)
    loss = weighted_sum(terms, weights_at(weights, 1))
    assert loss.item() == pytest.approx(3 / 6 + 2 * 5 / 6 + 3 * 4 + 0.5 * 4)
    assert set(terms) < set(TERMS)


def test_gradients_go_where_they_should():
    torch.manual_seed(0)
    latents = torch.randn(1, 4, 1, 2, 2, requires_grad=True)
    vectors = torch.randn(1, 4, 1, 2, 2, requires_grad=True)
    quantized = Quantized(latents_BDTHW=latents, codes_BTHW=torch.zeros(1, 1, 2, 2), vectors_BDTHW=vectors)
    # latents + (vectors - latents) rounds twice: measured 1.2e-7.
    torch.testing.assert_close(quantized.passed_through_BDTHW, vectors, rtol=0, atol=5e-7)
    weight = torch.randn_like(latents)
    (quantized.passed_through_BDTHW * weight).sum().backward()
    assert torch.equal(latents.grad, weight) and vectors.grad is None
    for name, moved, kept in (("codebook", vectors, latents), ("commitment", latents, vectors)):
        latents.grad = vectors.grad = None
        quantizer_terms(quantized)[name].backward()
        assert moved.grad.abs().sum() > 0 and (kept.grad is None or kept.grad.abs().sum() == 0)


def test_hinge_by_hand():
    real, drawn = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert discriminator_loss(real, drawn).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert adversarial_loss(drawn).item() == pytest.approx(2 / 3)
    # A score that is right by 1 or more is left alone, and the tokenizer wants high scores whatever they are.
    real.requires_grad_(), drawn.requires_grad_()
    gradients = torch.autograd.grad(discriminator_loss(real, drawn), (real, drawn))
    torch.testing.assert_close(gradients[0] * 6, torch.tensor([0.0, -1.0, -1.0]))
    torch.testing.assert_close(gradients[1] * 6, torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(torch.autograd.grad(adversarial_loss(drawn), drawn)[0], torch.full((3,), -1 / 3))


def test_adaptive_weight_by_hand():
    reconstruction, adversarial = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    assert adaptive_weight(reconstruction, adversarial).item() == pytest.approx(5 / 2.0001)
    assert adaptive_weight(reconstruction, torch.zeros(2)).item() == 1e4, "limited where the adversary has no opinion"


def test_every_weight_is_the_configured_one_from_the_configured_step():
    weights = {name: 0.5 + index for index, name in enumerate(TERMS)}
    config = LossConfig(
        **weights, perceptual_start_step=3, adversarial_start_step=5, vgg16_weights="file", lpips_heads="file"
    )
    for step in range(1, 8):
        found = weights_at(config, step)
        for name, weight in weights.items():
            start = 3 if name in PERCEPTUAL_TERMS else 5 if name == "adversarial" else 0
            assert found[name] == (weight if step > start else 0), (step, name)
    numbers = {name for name, kind in typing.get_type_hints(LossConfig).items() if kind is float}
    assert numbers - {"entropy_temperature"} == set(TERMS), "every other number of the section is a term's weight"


def test_means_of_equal_parts_compose():
    generator = torch.Generator().manual_seed(0)
    pixels, target = (torch.rand(4, 3, 8, 8, generator=generator) for _ in range(2))
    whole = pixel_terms(pixels, target)
    parts = [pixel_terms(*part) for part in zip(pixels.split(2), target.split(2), strict=True)]
    for name, term in whole.items():
        torch.testing.assert_close(torch.stack([part[name] for part in parts]).mean(), term)
    scores = torch.randn(2, 6, generator=generator)
    halves = [discriminator_loss(real, drawn) for real, drawn in zip(*(row.split(3) for row in scores), strict=True)]
    torch.testing.assert_close(torch.stack(halves).mean(), discriminator_loss(*scores))


def test_contradictions_are_refused():
    with pytest.raises(InputError, match=r"loss.lpips_vgg16 = 0.1: needs loss.vgg16_weights .*efficientnet_lite0"):
        LossConfig(lpips_vgg16=0.1)
    with pytest.raises(InputError, match=r"discriminator.num_layers 0: must be at least 1"):
        DiscriminatorConfig(num_layers=0)
    arguments = ["--media.inputs=[folder]", "--observe.run_dir=run", "--loss.adversarial=0.1"]
    bad = [*arguments, "--loss.adversarial_start_step=10", "--discriminator.start_step=20"]
    with pytest.raises(InputError, match=r"start_step = 10: must be at least discriminator.start_step = 20"):
        load(VisionTokenizerTrainingConfig, bad)

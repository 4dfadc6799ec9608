"""Loss terms of the quantizers against the published formulas, written out densely."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_ext.vision import quantizer as quantizers
from megatron_ext.vision.quantizer import build_quantizer
from tokenizer_train.vision.index_propagation import code_entropies
from tokenizer_train.vision.quantize_loss import quantize_latents, quantizer_terms

NUM_CODES, SIZE = 37, 6


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Five latents at a time, so that every function meets several groups and a shorter last one."""
    monkeypatch.setattr(quantizers, "ELEMENTS_AT_ONCE", 5 * NUM_CODES)


def problem(name: str, dtype: torch.dtype = torch.float32):
    """A quantizer, latents [2, 6, 1, 3, 4] that want a gradient, and weights for a loss on what the decoder gets."""
    generator = torch.Generator().manual_seed(1)
    quantizer = build_quantizer(name, NUM_CODES, SIZE).to(dtype)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.randn(NUM_CODES, SIZE, generator=generator, dtype=dtype))
    latents, weights = torch.randn(2, 2, SIZE, 1, 3, 4, generator=generator, dtype=dtype)
    return quantizer, latents.requires_grad_(), weights


def dense_ibq(latents, codebook, beta, temperature):
    """IndexPropagationQuantize and compute_entropy_loss of Emu3.5, whole matrices and autograd."""
    rows = latents.movedim(1, -1).reshape(-1, SIZE)
    scores = rows @ codebook.T
    soft = scores.softmax(1)
    hard = F.one_hot(soft.argmax(1), NUM_CODES).to(soft.dtype)
    drawn, chosen = (hard - soft.detach() + soft) @ codebook, hard @ codebook
    quantization = F.mse_loss(drawn, rows) + F.mse_loss(chosen.detach(), rows)
    quantization = quantization + beta * F.mse_loss(chosen, rows.detach())
    probabilities = (scores / temperature).softmax(1)
    sample = -(probabilities * (scores / temperature + 1e-5).log_softmax(1)).sum(1).mean()
    mean = probabilities.mean(0)
    return drawn, quantization, sample + (mean * (mean + 1e-5).log()).sum()


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_index_propagation_equals_the_dense_formula(temperature):
    quantizer, latents, weights = problem("ibq")
    codebook = quantizer.embedding.weight
    quantized = quantize_latents(quantizer, latents)
    terms = quantizer_terms(quantized, entropy_temperature=temperature)
    ours = (quantized.passed_through_BDTHW * weights).sum() + terms["entropy"]
    ours = ours + terms["index_propagation"] + terms["commitment"] + 0.25 * terms["codebook"]
    found = torch.autograd.grad(ours, (latents, codebook))
    drawn, quantization, entropy = dense_ibq(latents, codebook, 0.25, temperature)
    dense = (drawn * weights.movedim(1, -1).reshape(-1, SIZE)).sum() + quantization + entropy
    # Measured: the value 1e-7 relative, gradients 1.2e-6 absolute where they reach 20.
    torch.testing.assert_close(ours, dense, rtol=3e-6, atol=1e-6)
    for mine, theirs in zip(found, torch.autograd.grad(dense, (latents, codebook)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(quantized.passed_through_BDTHW, quantized.vectors_BDTHW)


def test_entropy_gradients_by_difference():
    quantizer, latents, _ = problem("ibq", torch.float64)
    rows = latents.detach().movedim(1, -1).reshape(-1, SIZE)[:7].requires_grad_()
    codebook = quantizer.embedding.weight
    assert torch.autograd.gradcheck(lambda z, e: code_entropies(z, e, 0.5, lambda mean_K: mean_K), (rows, codebook))


def test_mean_over_ranks_is_used():
    quantizer, latents, _ = problem("ibq")
    halves = latents.detach().clone().requires_grad_(), latents.detach().clone().requires_grad_()
    whole = quantizer_terms(quantize_latents(quantizer, latents), entropy_temperature=0.5)["entropy"]
    (expected,) = torch.autograd.grad(whole, latents)
    means = []

    def note(mean_K):
        means.append(mean_K)
        return mean_K

    for index, half in enumerate(halves):
        quantizer_terms(
            quantize_latents(quantizer, half[index : index + 1]), entropy_temperature=0.5, mean_over_ranks=note
        )
    joint = (means[0] + means[1]) / 2
    gradients = []
    for index, half in enumerate(halves):
        mine = quantize_latents(quantizer, half[index : index + 1])
        term = quantizer_terms(mine, entropy_temperature=0.5, mean_over_ranks=lambda mean_K: joint)["entropy"]
        gradients.append(torch.autograd.grad(term, half)[0] / 2)
    # Measured 2e-9.
    torch.testing.assert_close(gradients[0] + gradients[1], expected, rtol=1e-5, atol=1e-7)


def test_nearest_terms_by_hand():
    quantizer, latents, weights = problem("nearest")
    quantized = quantize_latents(quantizer, latents)
    rows, codebook = latents.detach().movedim(1, -1).reshape(-1, SIZE).numpy(), quantizer.embedding.weight.detach()
    distances = ((rows[:, None] - codebook.numpy()[None]) ** 2).sum(2)
    assert np.array_equal(quantized.codes_BTHW.flatten().numpy(), distances.argmin(1))
    terms = quantizer_terms(quantized)
    assert set(terms) == {"codebook", "commitment"}
    for term in terms.values():
        assert term.item() == pytest.approx(distances.min(1).mean() / SIZE, rel=1e-6)
    to_latents = torch.autograd.grad(terms["commitment"], latents, retain_graph=True)[0]
    to_codes = torch.autograd.grad(terms["codebook"], quantizer.embedding.weight, retain_graph=True)[0]
    difference = (latents.detach() - quantized.vectors_BDTHW.detach()) * 2 / latents.numel()
    torch.testing.assert_close(to_latents, difference)
    moves = -difference.movedim(1, -1).reshape(-1, SIZE)
    expected = torch.zeros_like(codebook).index_add_(0, quantized.codes_BTHW.flatten(), moves)
    torch.testing.assert_close(to_codes, expected)
    straight = torch.autograd.grad((quantized.passed_through_BDTHW * weights).sum(), latents)[0]
    assert torch.equal(straight, weights)


def test_codes_are_chosen_in_float32_under_autocast():
    for name in ("nearest", "ibq"):
        quantizer, _, _ = problem(name)
        latents = torch.randn(4, SIZE, 1, 20, 20, generator=torch.Generator().manual_seed(2))
        codes = quantize_latents(quantizer, latents).codes_BTHW
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(quantize_latents(quantizer, latents).codes_BTHW, codes)
            assert torch.equal(quantizer.assign(latents), codes)

"""Sampling against direct definitions, and against transformers' own logits processors."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_ext.config import InputError
from megatron_ext.generate.sampling import SamplingConfig, filtered_probabilities, guide, sample, seeded_generator

GREEDY = SamplingConfig(temperature=0, guidance_scale=1)


def logits(seed: int = 0, size: int = 50) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (20, 0.5), (100, 0.01)])
def test_filters_are_those_of_transformers(top_k: int, top_p: float) -> None:
    expected = TemperatureLogitsWarper(0.7)(None, logits()[None])
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    ours = filtered_probabilities(logits() / 0.7, top_k, top_p)
    torch.testing.assert_close(ours, expected.softmax(-1)[0], atol=1e-6, rtol=0)  # measured 0


def test_guidance_equals_that_on_log_probabilities() -> None:
    """The reference guides log-probabilities; after the softmax it is the same."""
    conditional, unconditional = logits(1), logits(2)
    c, u = conditional.log_softmax(0), unconditional.log_softmax(0)
    expected = (3.0 * (c - u) + u).softmax(0)
    torch.testing.assert_close(guide(conditional, unconditional, 3.0).softmax(0), expected, atol=1e-6, rtol=0)  # 9e-8
    assert guide(conditional, None, 3.0) is conditional


def test_only_allowed_ids_are_drawn() -> None:
    ranges = [(3, 5), (40, 42)]
    generator = torch.Generator().manual_seed(0)
    config = SamplingConfig(temperature=100.0, guidance_scale=1)
    drawn = {sample(logits(), None, ranges, config, generator) for _ in range(200)}
    assert drawn == {3, 4, 40, 41}


def test_greedy_takes_the_likeliest_of_the_allowed() -> None:
    values = logits()
    assert sample(values, None, [(0, 50)], GREEDY, torch.Generator()) == int(values.argmax())
    assert sample(values, None, [(10, 20)], GREEDY, torch.Generator()) == 10 + int(values[10:20].argmax())


def test_a_forced_id_takes_no_random_number() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert sample(logits(), None, [(7, 8)], SamplingConfig(guidance_scale=1), generator) == 7
    assert torch.equal(generator.get_state(), before)


def test_generators_differ_by_seed_and_sample_only() -> None:
    def first(seed: int, number: int) -> float:
        return torch.rand((), generator=seeded_generator(seed, number)).item()

    values = {(seed, number): first(seed, number) for seed in (0, 1, 2**40) for number in range(3)}
    assert len(set(values.values())) == 9
    assert first(1, 2) == values[1, 2]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(wrong))} "):
        SamplingConfig(**wrong)

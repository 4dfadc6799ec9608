"""The learning rate at the steps that define it."""

import math

import pytest

from megatron_ext.optim.schedule import learning_rate

SCHEDULE = {"peak": 1.0, "minimum": 0.1, "warmup_steps": 10, "decay_steps": 110}


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
def test_warm_up_is_linear_from_zero(style):
    assert [learning_rate(step, **SCHEDULE, style=style) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])


@pytest.mark.parametrize(("style", "quarter"), [("cosine", 0.55 + 0.45 * math.cos(math.pi / 4)), ("linear", 0.775)])
def test_decay_ends_at_the_minimum_and_stays(style, quarter):
    assert learning_rate(35, **SCHEDULE, style=style) == pytest.approx(quarter)
    assert learning_rate(60, **SCHEDULE, style=style) == pytest.approx(0.55)
    assert [learning_rate(step, **SCHEDULE, style=style) for step in (110, 500)] == [0.1, 0.1]


def test_constant():
    assert learning_rate(500, **SCHEDULE, style="constant") == 1.0


def test_without_warm_up_the_first_step_is_near_the_peak():
    rate = learning_rate(1, peak=1.0, minimum=0.0, warmup_steps=0, decay_steps=100, style="cosine")
    assert rate == pytest.approx(1.0, abs=1e-3)

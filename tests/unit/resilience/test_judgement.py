"""Which steps are bad."""

import math

import pytest

from megatron_ext.config import InputError
from megatron_ext.config.resilience import ResilienceConfig
from megatron_ext.resilience.judgement import fault_of, remembered

GOOD = [(2.0, 0.5), (1.0, 0.6), (3.0, 0.4)]
LOOKS = ResilienceConfig(spike_factor=3.0, spike_window=3)


@pytest.mark.parametrize(
    ("measured", "fault"),
    [
        ((2.5, 0.5), None),
        ((6.0, 1.5), None),  # three times the medians 2.0 and 0.5, not more
        ((6.1, 0.5), "loss 6.1, more than 3 times the median 2"),
        ((2.0, 1.6), "gradient norm 1.6, more than 3 times the median 0.5"),
        ((math.nan, 0.5), "loss nan"),
        ((2.0, math.inf), "gradient norm inf"),
    ],
)
def test_what_is_bad(measured: tuple[float, float], fault: str | None) -> None:
    assert fault_of(measured, GOOD, LOOKS) == fault


def test_without_enough_good_steps_nothing_is_a_spike() -> None:
    assert fault_of((100.0, 100.0), GOOD[:2], LOOKS) is None
    assert fault_of((100.0, 100.0), GOOD, ResilienceConfig()) is None
    assert fault_of((math.nan, 1.0), [], ResilienceConfig()) == "loss nan"


def test_only_a_window_is_remembered() -> None:
    assert remembered(GOOD, (4.0, 0.7), LOOKS) == ((1.0, 0.6), (3.0, 0.4), (4.0, 0.7))
    assert remembered(GOOD, (4.0, 0.7), ResilienceConfig()) == ()


@pytest.mark.parametrize("field", [{"spike_factor": 1.0}, {"slow_step_factor": 0.5}, {"spike_window": 0},
                                   {"hang_timeout_s": -1.0}])  # fmt: skip
def test_what_makes_no_sense_is_refused(field: dict) -> None:
    with pytest.raises(InputError, match=f"resilience.{next(iter(field))}"):
        ResilienceConfig(**field)

"""Two trainings compared."""

import math

from tests.support.decoding import History, Weights


def largest_difference(history: History, expected: History) -> float:
    """The largest relative difference of any loss or gradient norm at any step. Both may lack a loss (NaN)."""
    pairs = [
        (found[key], value)
        for found, step in zip(history, expected, strict=True)
        for key, value in step.items()
        if not (math.isnan(found[key]) and math.isnan(value))
    ]
    return max(abs(found - value) / abs(value) for found, value in pairs)


def assert_same_history(
    history: History,
    expected: History,
    bound: float,
    norm_bound: float | None = None,
    part_bound: float | None = None,
) -> None:
    """Losses of every step agree within `bound`, relative; gradient norms within `norm_bound`, or `bound` as well; the
    norms of the gradient's parts within `part_bound`, or as the whole."""
    norm_bound = bound if norm_bound is None else norm_bound
    part_bound = norm_bound if part_bound is None else part_bound
    for step, (found, wanted) in enumerate(zip(history, expected, strict=True)):
        for key, value in wanted.items():
            if math.isnan(value):
                assert math.isnan(found[key]), f"{key} at step {step}: {found[key]}, there should be none"
                continue
            allowed = part_bound if key.startswith("grad_norm/") else norm_bound if key == "grad_norm" else bound
            error = abs(found[key] - value) / abs(value)
            assert error <= allowed, f"{key} at step {step}: {found[key]}, expected {value}, error {error:.1e}"


def assert_same_weights(weights: Weights, expected: Weights, bound: float) -> None:
    """Every weight agrees within `bound`, absolute."""
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        error = (weights[name] - value).abs().max().item()
        assert error <= bound, f"{name}: error {error:.1e}"

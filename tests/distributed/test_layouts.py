"""Every layout is the same training: losses, gradient norms and weights agree with one process."""

import pytest
from tests.support.decoding import train_losses
from tests.support.distributed import run_distributed

LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "cp2": (2, {"context_parallel_size": 2}),
    "dp2": (2, {}),
    "tp2_sp_cp2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2}),
}


@pytest.fixture(scope="module", params=["document", "window"])
def one_process(request):
    return request.param, run_distributed(train_losses, 1, {}, 4, 4, request.param)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_agrees_with_one_process(name, one_process):
    scope, (expected_history, expected_weights) = one_process
    world_size, parallel = LAYOUTS[name]
    history, weights = run_distributed(train_losses, world_size, parallel, 4, 4, scope)[0]
    for step, (found, expected) in enumerate(zip(history, expected_history, strict=True)):
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-5), f"{key} at step {step}"
    for key, value in expected_weights.items():
        assert (weights[key] - value).abs().max() < 1e-5, key

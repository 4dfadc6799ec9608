"""Checkpoints between CPU and GPU: torch's AdamW and Transformer Engine's FusedAdam go on from each other's state."""

import pytest

from tests.gpu.test_decoder import BF16, MODEL
from tests.support.decoding import walk
from tests.support.distributed import run_distributed

DEVICES = {"cpu": {"device": "cpu", "precision": "bf16", "model": MODEL}, "gpu": BF16 | {"model": MODEL}}
LAST = 3


def trained(device: str, cases: list[dict]) -> list[tuple[list[dict[str, float]], dict]]:
    """(history, weights) of trainings on one device; each device has processes of its own."""
    return run_distributed(walk, 1, [({}, DEVICES[device] | options) for options in cases])[0]


@pytest.mark.parametrize(("saving", "loading"), [("cpu", "gpu"), ("gpu", "cpu"), ("gpu", "gpu")])
def test_training_goes_on_where_another_device_saved(saving, loading, tmp_path):
    """The step after the load is the uninterrupted training's. Moments that were lost, or a step count that restarts,
    would make it as long as the learning rate in every weight."""
    (expected, after), (_, before) = trained(saving, [{"steps": LAST}, {"steps": LAST - 1, "folder": str(tmp_path)}])
    ((found, weights),) = trained(loading, [{"steps": LAST, "folder": str(tmp_path)}])
    assert len(found) == 1, "the training began anew"
    assert found[0]["loss"] == pytest.approx(expected[-1]["loss"], rel=2e-2)  # not measured yet: bf16
    # Matrices: norms stand in modules of other names on the two devices (one name on disk).
    for name in (name for name, weight in weights.items() if weight.dim() > 1):
        weight = weights[name]
        step, wanted = (weight - before[name]).float(), (after[name] - before[name]).float()
        # Not measured yet: bf16 gradients of two devices, and weights rounded to bf16 after the step.
        assert (step - wanted).norm() < 0.3 * wanted.norm(), name

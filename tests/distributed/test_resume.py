"""A resumed training is the uninterrupted one: bit for bit on the same layout, within rounding on another."""

import pytest

from tests.support.decoding import walk
from tests.support.distributed import run_distributed

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CP2 = {"context_parallel_size": 2}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bitwise_on_the_same_layout(tmp_path, precision):
    same = {"precision": precision}
    kept = same | {"folder": str(tmp_path)}
    cases = [({}, same | {"steps": 6}), ({}, kept | {"steps": 3}), ({}, kept | {"steps": 6})]
    (straight, _), (first, _), (second, _) = run_distributed(walk, 1, cases)[0]
    assert first + second == straight


def test_resume_on_other_layouts(tmp_path):
    kept = {"folder": str(tmp_path)}
    (straight, weights) = run_distributed(walk, 1, [({}, {"steps": 6})])[0][0]
    cases = [(TP2_SP, kept | {"steps": 2}), (CP2, kept | {"steps": 4}), ({}, kept | {"steps": 6})]
    _, _, (history, found) = run_distributed(walk, 2, cases)[0]
    assert len(history) == 2
    for step, expected in zip(history, straight[4:], strict=True):
        assert step == pytest.approx(expected, rel=5e-6)  # measured 3e-7
    for name, value in weights.items():
        assert (found[name] - value).abs().max() < 7e-6, name  # measured 7e-7 after 6 steps at lr 1e-2


def test_shared_adam_step_would_be_caught(tmp_path):
    """megatron-core loads one `step` tensor for all parameters; without our repair the resumed training differs."""
    kept = {"folder": str(tmp_path)}
    cases = [({}, {"steps": 5}), ({}, kept | {"steps": 2}), ({}, kept | {"steps": 5})]
    (straight, _), _, (broken, _) = run_distributed(walk_without_repair, 1, cases)[0]
    # The wrong step first acts in the update of step 3, so the loss of step 4 is the first to show it.
    assert broken[0]["loss"] == straight[2]["loss"]
    assert abs(broken[2]["loss"] - straight[4]["loss"]) > 1e-4


def walk_without_repair(cases):
    import megatron_ext.checkpoint.decoder as decoder

    decoder.unshare_adam_steps = lambda optimizer: None
    return walk(cases)

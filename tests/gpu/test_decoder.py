"""The decoder on a GPU: Transformer Engine trains like plain torch on the CPU, and checkpoints go on."""

import pytest

from tests.support.decoding import walk
from tests.support.distributed import run_distributed

pytestmark = pytest.mark.gpu

# Heads of 64 channels: what fused attention takes.
MODEL = {"hidden_size": 256, "ffn_hidden_size": 512, "num_query_groups": 2, "kv_channels": 64}
# Not measured yet: bf16 keeps 8 bits, and the losses here are near 4.7.
BOUND = 2e-2


def test_losses_agree_with_the_cpu():
    on_cpu = ({}, {"model": MODEL})
    on_gpu = ({}, {"model": MODEL, "device": "cuda", "precision": "bf16"})
    expected, _ = run_distributed(walk, 1, [on_cpu])[0][0]
    found, _ = run_distributed(walk, 1, [on_gpu])[0][0]
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=BOUND), f"step {step}"


def test_a_checkpoint_goes_from_gpu_to_gpu(tmp_path):
    gpu = {"model": MODEL, "device": "cuda", "precision": "bf16"}
    kept = gpu | {"folder": str(tmp_path)}
    cases = [({}, gpu | {"steps": 4}), ({}, kept | {"steps": 2}), ({}, kept | {"steps": 4})]
    (straight, _), (first, _), (second, _) = run_distributed(walk, 1, cases)[0]
    for ours, theirs in zip(first + second, straight, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=BOUND)

"""The decoder on GPUs: Transformer Engine's modules train like plain torch on the CPU.

Trainings run in one process group per device and number of ranks: the first step of a process compiles kernels.
No bound here has been measured yet; each says what it was set from.
"""

import math

import pytest
import torch

from tests.support.decoding import walk
from tests.support.distributed import run_distributed

# Heads of 64 channels, widths of multiples of 16: what fused attention and FP8 products take.
MODEL = {"hidden_size": 256, "ffn_hidden_size": 512, "num_query_groups": 2, "kv_channels": 64}
QK_NORM = MODEL | {"qk_layernorm": True}
DROPOUT = MODEL | {"attention_dropout": 0.1, "hidden_dropout": 0.1}
BF16 = {"device": "cuda", "precision": "bf16"}
FP8 = {"device": "cuda", "precision": "fp8"}  # in the default recipe
TRAININGS = {
    "bf16": BF16 | {"model": MODEL},
    "bf16_window": BF16 | {"model": MODEL, "scope": "window"},
    "bf16_two_windows_a_row": BF16 | {"model": MODEL, "micro_batch_size": 2},
    "bf16_qk_norm": BF16 | {"model": QK_NORM},
    "fp8": FP8 | {"model": MODEL, "micro_batch_size": 2},
    "dropout": BF16 | {"model": DROPOUT},
    "dropout_again": BF16 | {"model": DROPOUT},
}
ON_CPU = {name: options | {"device": "cpu", "precision": "fp32"} for name, options in TRAININGS.items()}
# Not measured yet. bf16 keeps 8 bits, FP8 (e4m3) 4: relative steps of 0.4 % and 6 %, which average out over a layer's
# sums; the losses are near 4.7.
BOUNDS = {"bf16": 2e-2, "fp8": 5e-2}


@pytest.fixture(scope="module")
def on_gpu():
    """Training -> losses and gradient norm of each step, on one GPU."""
    results = run_distributed(walk, 1, [({}, options) for options in TRAININGS.values()])[0]
    return {name: history for name, (history, _) in zip(TRAININGS, results, strict=True)}


@pytest.fixture(scope="module")
def on_cpu():
    """The same in fp32 with the torch modules."""
    results = run_distributed(walk, 1, [({}, options) for options in ON_CPU.values()])[0]
    return {name: history for name, (history, _) in zip(ON_CPU, results, strict=True)}


@pytest.mark.parametrize("training", [name for name in TRAININGS if not name.startswith("dropout")])
def test_losses_agree_with_the_cpu(training, on_gpu, on_cpu):
    bound = BOUNDS[TRAININGS[training]["precision"]]
    for step, (found, expected) in enumerate(zip(on_gpu[training], on_cpu[training], strict=True)):
        assert found["loss"] == pytest.approx(expected["loss"], rel=bound), f"step {step}"
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=10 * bound), f"step {step}"


def test_fp8_is_not_bf16(on_gpu):
    """FP8 that silently did nothing would agree with the CPU best of all."""
    assert on_gpu["fp8"][0]["loss"] != on_gpu["bf16_two_windows_a_row"][0]["loss"]


def test_dropout_trains_and_is_a_function_of_the_seed(on_gpu):
    first, again, without = on_gpu["dropout"], on_gpu["dropout_again"], on_gpu["bf16"]
    assert all(math.isfinite(step["loss"] + step["grad_norm"]) for step in first)
    assert first[0]["loss"] == again[0]["loss"], "masks are drawn from the seed of the microbatch"
    assert first[0]["loss"] != without[0]["loss"]
    assert first[0]["loss"] == pytest.approx(without[0]["loss"], rel=0.05)


SEVERAL = {
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "cp2": {"context_parallel_size": 2},
    "dp2_overlap": {"overlap_grad_reduce": True},
}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("layout", SEVERAL)
def test_layouts_agree_with_the_cpu(layout, on_cpu):
    ((found, _),) = run_distributed(walk, 2, [(SEVERAL[layout], TRAININGS["bf16"])])[0]
    for step, (ours, theirs) in enumerate(zip(found, on_cpu["bf16"], strict=True)):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=BOUNDS["bf16"]), f"step {step}"

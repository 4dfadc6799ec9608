"""The formula for Transformer Engine's layers: published, and in closed form.

It is measured by tests/gpu/test_plan.py; the one for a CPU by test_memory.py.
"""

import dataclasses

import pytest

from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.plan import PRESETS
from megatron_ext.plan.activations import layer_on_gpu

SHAPE = PRESETS["emu3_8b"]
SMALL = 8 + 4 * 32  # normalizers of two norms and of 32 softmaxes, in fp32


@pytest.mark.parametrize("tensor", [1, 4])
def test_bf16_with_sequence_parallelism(tensor):
    h, q, k, f = 4096, 4096, 1024, 14336
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1)
    assert layer_on_gpu(SHAPE, parallel, "bf16") == (10 * h + 4 * q + 4 * k + 6 * f + SMALL) / tensor


def test_without_sequence_parallelism_norms_and_masks_are_whole():
    h, q, k, f = 4096, 4096, 1024, 14336
    expected = 10 * h + 8 + (4 * q + 4 * k + 6 * f + 4 * 32) / 4
    assert layer_on_gpu(SHAPE, ParallelConfig(tensor_model_parallel_size=4), "bf16") == expected


def test_the_published_34():
    """Korthikanti et al., section 4.1: 34 s b h for a layer without its scores, of multi-head attention and an MLP of
    width 4 h. SwiGLU of two thirds of that width keeps as much."""
    shape = dataclasses.replace(
        SHAPE, hidden_size=3072, num_attention_heads=24, num_query_groups=24, ffn_hidden_size=8192
    )
    normalizers = 8 + 4 * 24
    assert layer_on_gpu(shape, ParallelConfig(), "bf16") - normalizers == 34 * 3072


def test_fp8_halves_the_inputs_of_matrix_products():
    h, q, f = 4096, 4096, 14336
    saved = layer_on_gpu(SHAPE, ParallelConfig(), "bf16") - layer_on_gpu(SHAPE, ParallelConfig(), "fp8")
    assert saved == 2 * h + f - q  # two norms' outputs and the MLP's product; the context is kept in both

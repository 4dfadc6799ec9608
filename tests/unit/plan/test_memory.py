"""Planned bytes against those of live trainings of a narrow decoder."""

import pytest

from megatron_ext.config.model import ModelConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.config.train import TrainConfig
from megatron_ext.plan import DecoderShape
from megatron_ext.plan.memory import rank_memory
from tests.support.memory import LAYOUT, SEQ_LENGTH, measure_all

# No two widths equal, so that no formula is right by taking one for another.
MODEL = {
    "num_layers": 4, "hidden_size": 96, "ffn_hidden_size": 160, "num_attention_heads": 6, "num_query_groups": 2,
    "kv_channels": 24, "attention_dropout": 0.0, "hidden_dropout": 0.0,
}  # fmt: skip
TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
UNIFORM, BLOCK, SELECTIVE = (
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    {"recompute_granularity": "selective"},
)
# name: parallel, changes to the model, precision, micro-batch size
CASES = {
    1: {
        "fp32": ({}, {}, "fp32", 1),
        "bf16": ({}, {}, "bf16", 1),
        "two windows": ({}, {}, "bf16", 2),
        "wide": ({}, {"hidden_size": 1024, "num_layers": 1}, "bf16", 1),  # the head's weight is more than its logits
        "qk norm": ({}, {"qk_layernorm": True}, "bf16", 1),
        "hidden dropout": ({}, {"hidden_dropout": 0.1}, "bf16", 1),
        "attention dropout": ({}, {"attention_dropout": 0.1}, "fp32", 1),
        "uniform": (UNIFORM, {}, "bf16", 1),
        "block": (BLOCK, {}, "bf16", 1),
        "selective": (SELECTIVE, {}, "bf16", 1),
    },
    2: {
        "dp 2": ({}, {}, "bf16", 1),
        "tp 2": (TP2, {}, "bf16", 1),
        "tp 2 + sp": (TP2 | SP, {"hidden_dropout": 0.1}, "bf16", 1),
        "tp 2 + sp, uniform": (TP2 | SP | UNIFORM, {}, "bf16", 1),
        "cp 2": ({"context_parallel_size": 2}, {}, "bf16", 1),
    },
}


# Measured: 0.1 % (megatron-core's alignment of parameters), and 2.6 % of the activations of context size 2, where
# attention in plain torch keeps a mask for each chunk.
BOUND = 0.03
# The most that a microbatch holds beside weights, gradients and optimizer. Measured: 3.8 % too much where 2 layers are
# recomputed at a time, 2.4 % too little at context size 2, elsewhere below 2 %.
PEAK_BOUND = 0.05


@pytest.fixture(scope="module")
def measured(ranks):
    """(world size, case) -> bytes by kind on the fullest rank."""
    found = {}
    for world_size, cases in CASES.items():
        rows = [(parallel, MODEL | model, precision, size) for parallel, model, precision, size in cases.values()]
        by_rank = ranks.run(measure_all, world_size, rows)
        for name, found_by in zip(cases, zip(*by_rank, strict=True), strict=True):
            found[world_size, name] = {kind: max(rank[kind] for rank in found_by) for kind in found_by[0]}
    return found


@pytest.mark.parametrize(("world_size", "case"), [(size, name) for size, cases in CASES.items() for name in cases])
def test_planned_is_measured(world_size, case, measured):
    parallel, model, precision, micro_batch_size = CASES[world_size][case]
    planned = rank_memory(
        DecoderShape.of(ModelConfig(**(MODEL | model))),
        LAYOUT.size,
        RuntimeConfig(device="cpu", precision=precision),
        ParallelConfig(**parallel),
        TrainConfig(train_steps=1, seq_length=SEQ_LENGTH, micro_batch_size=micro_batch_size),
        world_size,
    )
    found = measured[world_size, case]
    for kind in ("weights", "gradients", "optimizer", "activations"):
        assert getattr(planned, kind) == pytest.approx(found[kind], rel=BOUND), kind
    state = planned.weights + planned.gradients + planned.optimizer
    assert planned.peak - state == pytest.approx(found["microbatch"], rel=PEAK_BOUND)

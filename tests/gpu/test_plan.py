"""The plan's memory against a GPU's allocator."""

import pytest

from megatron_ext.config.model import ModelConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.config.train import TrainConfig
from megatron_ext.plan import DecoderShape
from megatron_ext.plan.memory import rank_memory
from tests.support.distributed import run_distributed
from tests.support.memory import LAYOUT, measure_allocator

MODEL = {"num_layers": 4, "hidden_size": 2048, "ffn_hidden_size": 7168, "num_attention_heads": 16,
         "num_query_groups": 4, "kv_channels": 128}  # fmt: skip
SEQ_LENGTH = 16_384
CASES = {
    "bf16": {},
    "uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_planned_is_allocated(case):
    parallel = ParallelConfig(**CASES[case])
    runtime = RuntimeConfig(device="cuda", precision="bf16")
    ((state, peak),) = run_distributed(measure_allocator, 1, CASES[case], MODEL, SEQ_LENGTH)
    train = TrainConfig(train_steps=1, seq_length=SEQ_LENGTH)
    planned = rank_memory(DecoderShape.of(ModelConfig(**MODEL)), LAYOUT.size, runtime, parallel, train, 1)
    # Not measured yet.
    assert planned.weights + planned.gradients + planned.optimizer == pytest.approx(state, rel=0.1)
    assert planned.peak == pytest.approx(peak, rel=0.1)

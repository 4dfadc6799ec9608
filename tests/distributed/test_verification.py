"""The layout verification: silent about layouts that agree, and about every kind of layout of two ranks."""

import pytest
from rich.console import Console

from megatron_ext.config.data import DataConfig
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.observe import ObserveConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.run import RunConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.config.train import TrainConfig
from tests.support.decoding import LAYOUT
from tests.support.distributed import use_next_store

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
# parallel, then what else differs: by section
CASES = {
    "tp2_sp": (TP2_SP, {}),
    "tp2_sp_qk_norm": (TP2_SP | {"recompute_granularity": "selective"}, {"model": {"qk_layernorm": True}}),
    "cp2": (CP2, {}),
    "cp2_window_scope": (CP2, {"data": {"attention_scope": "window"}, "train": {"micro_batch_size": 2}}),
    "dp2_overlap": ({"overlap_grad_reduce": True, "overlap_param_gather": True}, {}),
    "cp2_bf16": (CP2, {"runtime": {"precision": "bf16"}}),
}
STEPS = 3


def config_of(parallel: dict, changes: dict) -> RunConfig:
    def section(name: str, **values):
        return values | changes.get(name, {})

    return RunConfig(
        parallel=ParallelConfig(**parallel),
        runtime=RuntimeConfig(**section("runtime", device="cpu")),
        model=ModelConfig(**section("model", preset="tiny", hidden_size=64, kv_channels=16, ffn_hidden_size=96)),
        train=TrainConfig(**section("train", seq_length=1024, global_batch_size=8, train_steps=1)),
        data=DataConfig(**section("data", document_alignment=4)),
        observe=ObserveConfig(run_dir="unused"),
    )


def verify_all(cases: list[tuple[dict, dict]], world_size: int) -> list:
    from megatron_ext.train.verify import verify

    found = []
    for parallel, changes in cases:
        found.append(verify(config_of(parallel, changes), world_size, STEPS, LAYOUT, Console(quiet=True)))
        use_next_store()
    return found


@pytest.fixture(scope="module")
def verifications(request, ranks):
    """Case -> Verification of every rank, for the cases that this session selected."""
    selected = {item.callspec.params["case"] for item in request.session.items if request.module is item.module}
    cases = [case for case in CASES if case in selected]
    by_rank = ranks.run(verify_all, 2, [CASES[case] for case in cases], 2)
    return dict(zip(cases, zip(*by_rank, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_layout_that_agrees_is_verified(case, verifications):
    here, there = (found.comparisons for found in verifications[case])
    assert here == there, "every rank must come to the same verdict"
    assert not [comparison for comparison in here if not comparison.agrees]
    assert [comparison.quantity for comparison in here] == [
        "loss", "loss_text", "loss_vision", "loss_dataset/random", "grad_norm", "weights", "replicas",
    ]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_something_was_compared(case, verifications):
    """Two layouts round differently: a difference of exactly zero everywhere would mean one was not trained."""
    weights = next(comparison for comparison in verifications[case][0].comparisons if comparison.quantity == "weights")
    assert weights.difference > 0


@pytest.mark.parametrize("case", ["dp2_overlap"])
def test_gradients_that_are_reduced_in_buckets_are_so_in_several_padded_ones(case, verifications):
    buckets = verifications[case][0].buckets
    assert len(buckets) >= 3 and sum(bucket.padded > bucket.elements for bucket in buckets[:-1]) >= 2

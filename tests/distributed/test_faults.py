"""Faults that only several ranks can have, through the whole program."""

import math
import os

import pytest

from megatron_ext.config import InputError
from tests.support.distributed import use_next_store
from tests.support.small_run import write_small_run

TP2 = "--parallel.tensor_model_parallel_size 2 "


def pretrain(arguments: str) -> str:
    """What this rank refuses."""
    import pretrain_emu3

    try:
        with pytest.raises(InputError) as refused:
            pretrain_emu3.main(arguments.split())
        return str(refused.value)
    finally:
        use_next_store()


def refusals(rows: list[str]) -> list[str]:
    return [pretrain(row) for row in rows]


def spoil_rank_1(arguments: str) -> str:
    """Train while the second microbatch of every step of rank 1, from the second step on, has a loss of NaN."""
    from megatron_ext.objectives import NextToken

    loss, calls = NextToken.loss, []

    def spoilt(self, *given):
        result = loss(self, *given)
        calls.append(result)
        # The dry step has one microbatch, each step two.
        if os.environ["RANK"] == "1" and len(calls) == 1 + 2 + 2:
            result = type(result)(result.loss_sum * math.nan, result.weight_sum, result.metrics)
        return result

    NextToken.loss = spoilt
    try:
        return pretrain(arguments)
    finally:
        NextToken.loss = loss


@pytest.fixture
def options(tmp_path) -> str:
    write_small_run(tmp_path)
    return f"--config {tmp_path}/config.yaml --observe.run_dir {tmp_path}/run "


def test_what_does_not_divide_over_the_tensor_axis_is_refused_on_every_rank(ranks, options):
    rows = {
        "--model.num_attention_heads 3 --model.num_query_groups 3": "model.num_attention_heads 3",
        "--model.num_query_groups 1": "model.num_query_groups 1",
        "--model.num_query_groups 2 --model.ffn_hidden_size 17": "model.ffn_hidden_size 17",
    }
    first, second = ranks.run(refusals, 2, [options + TP2 + row for row in rows])
    assert first == second
    for line, named in zip(first, rows.values(), strict=True):
        assert named in line and "tensor_model_parallel_size 2" in line, line


def test_a_loss_that_is_not_finite_names_its_rank_step_and_documents(ranks, options, tmp_path):
    line, other = ranks.run(spoil_rank_1, 2, options)
    assert line.startswith("step 2 has gradient norm nan; ")
    named = line.partition("rank 1's loss is not finite, on documents ")[2].partition(":")[0]
    assert named and f"on documents {named}" in other
    assert "rank 0" not in line and not (tmp_path / "run" / "checkpoints" / "latest").exists()

    from megatron_ext.config import load
    from megatron_ext.config.run import RunConfig
    from megatron_ext.data import build_data
    from megatron_ext.vocab import Vocabulary
    from tests.support.small_run import Place

    config = load(RunConfig, options.split())
    loader = build_data(config.data, config.train, Vocabulary.load(config.vocab), Place(1)).train
    assert set(named.removesuffix(", ...").split(", ")) <= set(loader.own_keys(4)[1])

"""Suggested layouts would start, fit, and recompute no more than they must."""

import dataclasses
from pathlib import Path

import pytest

from megatron_ext.config import load
from megatron_ext.config.run import RunConfig
from megatron_ext.config.validate import broken_rules
from megatron_ext.plan import take_question
from megatron_ext.plan.job import USABLE_SHARE, plan_job
from megatron_ext.plan.memory import rank_memory
from megatron_ext.plan.suggest import suggest_layouts

ROOT = Path(__file__).parents[3]
QUESTION, _ = take_question(["--suggest", "--world_size", "128"])
USABLE = USABLE_SHARE * QUESTION.memory_gib * 2**30


def configuration(name: str, *changes: str) -> RunConfig:
    return load(RunConfig, ["--config", str(ROOT / "examples" / f"{name}.yaml"), *changes])


@pytest.mark.parametrize("name", ["emu3_8b_stage1", "emu3_8b_stage2"])
def test_layouts_start_and_fit_with_the_least_recomputation(name):
    config = configuration(name)
    plan = plan_job(config, QUESTION)
    layouts = suggest_layouts(config, plan, QUESTION)
    assert len(layouts) > 5
    assert [layout.overhead for layout in layouts] == sorted(layout.overhead for layout in layouts)
    for layout in layouts:
        parallel = layout.parallel
        assert not broken_rules(dataclasses.replace(config, parallel=parallel), QUESTION.world_size)
        assert layout.memory.peak <= USABLE
        if parallel.recompute_num_layers:
            less = parallel.recompute_num_layers - 1
            method = {"recompute_num_layers": less} if less else dict.fromkeys(
                ("recompute_granularity", "recompute_method", "recompute_num_layers")
            )  # fmt: skip
            fuller = rank_memory(
                plan.shape, plan.vocab_size, config.runtime, dataclasses.replace(parallel, **method), config.train, 128
            )
            assert fuller.peak > USABLE


def test_what_is_known_to_work_is_among_them():
    """NVIDIA trains 8B models at 8,192 with context size 2, and 7B ones at 131,072 with tensor 4 x context 4."""

    def sizes(name):
        config = configuration(name)
        layouts = suggest_layouts(config, plan_job(config, QUESTION), QUESTION)
        return [(p.parallel.tensor_model_parallel_size, p.parallel.context_parallel_size) for p in layouts]

    assert sizes("emu3_8b_stage1")[0] == (1, 2)
    assert (4, 4) in sizes("emu3_8b_stage2")[:3]


def test_a_fault_that_no_layout_cures_hides_none():
    """Without data every layout is refused at the start; which would fit is still worth knowing."""
    config = configuration("emu3_8b_stage1", "--data.train", "[]", "--train.global_batch_size", "100")
    plan = plan_job(config, QUESTION)
    assert len(plan.faults) == 2
    layouts = suggest_layouts(config, plan, QUESTION)
    assert layouts and all(100 % layout.data_parallel_size == 0 for layout in layouts)

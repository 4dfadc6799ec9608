"""Every rule that spans sections: a configuration that breaks it, and what the message must name."""

import dataclasses
from typing import Any

import pytest

from megatron_ext.config import InputError, load
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.run import RunConfig
from megatron_ext.config.validate import RULES, broken_rules, validate

GOOD = load(
    RunConfig,
    ["--train.train_steps", "3", "--train.seq_length", "64", "--train.global_batch_size", "4", "--observe.run_dir", "x",
     "--data.train", '[{"prefix": "a"}]'],
)  # fmt: skip

BROKEN = [
    ({"parallel.tensor_model_parallel_size": 3}, 4, "parallel.tensor_model_parallel_size 3"),
    ({"parallel.context_parallel_size": 0}, 1, "parallel.context_parallel_size 0"),
    ({"parallel.sequence_parallel": True}, 1, "parallel.sequence_parallel is true"),
    ({"train.micro_batch_size": 0}, 1, "train.micro_batch_size 0"),
    ({"train.micro_batch_size": 3}, 1, "train.global_batch_size 4"),
    ({}, 8, "data-parallel size 8"),
    ({"train.global_batch_size_ramp": (2, 3, 40)}, 2, "train.global_batch_size_ramp [2, 3, 40]"),
    (
        {"parallel.context_parallel_size": 2, "train.seq_length": 66, "data.attention_scope": "window"},
        2,
        "train.seq_length 66",
    ),
    ({"parallel.context_parallel_size": 2, "data.document_alignment": 2}, 2, "data.document_alignment 2"),
    ({"data.document_alignment": 24}, 1, "data.document_alignment 24"),
    ({"train.seq_length": 2**26, "objective.vision_loss_weight": 0.35}, 1, "objective.vision_loss_weight 0.35"),
    ({"train.seq_length": 2**24, "objective.vision_loss_weight": 100.0}, 1, "2^31"),
    ({"train.seq_length": 2**28}, 1, "2^31"),
    ({"optim.lr_warmup_steps": 3}, 1, "optim.lr_warmup_steps 3"),
    ({"data.train": ()}, 1, "data.train is empty"),
    ({"train.eval_interval": 5}, 1, "data.valid"),
    ({"parallel.overlap_param_gather": True}, 1, "parallel.overlap_grad_reduce"),
    ({"parallel.recompute_granularity": "full"}, 1, "parallel.recompute_granularity full"),
    (
        {
            "parallel.recompute_granularity": "selective",
            "parallel.recompute_method": "uniform",
            "parallel.recompute_num_layers": 1,
        },
        1,
        "parallel.recompute_granularity selective",
    ),
    ({"runtime.precision": "fp8", "train.seq_length": 72}, 1, "a multiple of 16"),
    ({"runtime.precision": "fp8", "runtime.fp8_recipe": "blockwise"}, 1, "a multiple of 128"),
    ({"train.manual_gc_interval": -1}, 1, "train.manual_gc_interval -1"),
    ({"train.exit_duration": -0.5}, 1, "train.exit_duration -0.5"),
    ({"runtime.distributed_timeout_s": 300}, 1, "resilience.hang_timeout_s 480 is not below"),
    ({"checkpoint.init_optimizer": True}, 1, "checkpoint.init_optimizer is true without checkpoint.init_from"),
]


def change(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    for name, value in changes.items():
        section, field = name.split(".")
        part = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: part})
    return config


@pytest.mark.parametrize(("changes", "world_size", "named"), BROKEN)
def test_broken(changes, world_size, named):
    with pytest.raises(InputError) as error:
        validate(change(GOOD, changes), world_size)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.eval_interval", -1), ("train.eval_steps", 0), ("observe.log_interval", 0),
        ("checkpoint.save_interval", 0), ("checkpoint.save_timeout_s", 0.0),
    ],
)  # fmt: skip
def test_what_one_section_knows_alone(name, value):
    with pytest.raises(InputError, match=f"^{name} {value}: ") as error:
        change(GOOD, {name: value})
    assert "\n" not in str(error.value)


def test_every_rule_is_broken_by_one_row_of_the_table():
    rows = [(change(GOOD, changes), world_size) for changes, world_size, _ in BROKEN]
    first_broken = {next(rule for rule in RULES if rule.broken(config, size)) for config, size in rows}
    assert first_broken == set(RULES)


def test_every_broken_rule_is_listed():
    """Also where a size is 0, which other rules divide by."""
    nothing = {"parallel.tensor_model_parallel_size": 0, "train.micro_batch_size": 0, "data.train": ()}
    messages = [rule.message(change(GOOD, nothing), 1) for rule in broken_rules(change(GOOD, nothing), 1)]
    assert len(messages) == 3
    for name, message in zip(nothing, messages, strict=True):
        assert name in message


def test_the_largest_count_is_exact():
    """At weight 1/4 a label weighs at most 4: 4 windows x S x 4 reaches 2^31 at S = 2^27."""
    below, at = (
        change(GOOD, {"train.seq_length": s, "objective.vision_loss_weight": 0.25}) for s in (2**27 - 1, 2**27)
    )
    assert validate(below, 1) is None
    with pytest.raises(InputError, match=r"2\^31"):
        validate(at, 1)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_good(world_size):
    assert validate(GOOD, world_size) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bucket_size": 0, "overlap_grad_reduce": True}, "parallel.bucket_size 0: must be at least 1; null is"),
        ({"bucket_size": 10**6}, "parallel.bucket_size 1000000 with parallel.overlap_grad_reduce false"),
    ],
)
def test_a_size_of_buckets_is_one_that_acts(options, said):
    with pytest.raises(InputError, match=said):
        ParallelConfig(**options)
    assert ParallelConfig(overlap_grad_reduce=True, bucket_size=1).bucket_size == 1

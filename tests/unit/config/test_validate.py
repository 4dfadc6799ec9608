"""What a run's configuration may not be: in one section, which then cannot be made, and across sections, which the
table of rules tells."""

import dataclasses
from typing import Any

import pytest

from megatron_ext.config import InputError, load
from megatron_ext.config.data import LONGEST_PERIOD, DataConfig, DatasetConfig
from megatron_ext.config.run import RunConfig
from megatron_ext.config.validate import RULES, broken_rules, validate

GOOD = load(
    RunConfig,
    ["--train.train_steps", "3", "--train.seq_length", "64", "--train.global_batch_size", "4", "--observe.run_dir", "x",
     "--data.train", '[{"prefix": "a"}]'],
)  # fmt: skip

BROKEN = [
    ({"parallel.tensor_model_parallel_size": 3}, 4, "parallel.tensor_model_parallel_size 3"),
    ({"parallel.context_parallel_size": 2}, 1, "parallel.context_parallel_size 2 does not divide the 1 ranks"),
    (
        {"parallel.tensor_model_parallel_size": 4, "model.num_attention_heads": 6},
        4,
        "model.num_attention_heads 6 is not a multiple of",
    ),
    ({"parallel.tensor_model_parallel_size": 4}, 4, "model.num_query_groups 2 is not a multiple of"),
    ({"model.ffn_hidden_size": 703, "parallel.tensor_model_parallel_size": 2}, 2, "model.ffn_hidden_size 703"),
    (
        {
            "model.preset": "emu3_8b",
            "parallel.cp_comm_type": "a2a",
            "parallel.context_parallel_size": 16,
            "train.seq_length": 5120,
            "data.document_alignment": 32,
        },
        16,
        "parallel.cp_comm_type a2a deals the 8 query groups of a tensor rank to 16 context ranks",
    ),
    (
        {"runtime.precision": "fp8", "model.hidden_size": 200},
        1,
        "model.hidden_size is 200, runtime.fp8_recipe tensorwise needs a multiple of 16",
    ),
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
    ({"runtime.precision": "fp8", "train.seq_length": 72}, 1, "a multiple of 16"),
    ({"runtime.precision": "fp8", "runtime.fp8_recipe": "blockwise", "model.ffn_hidden_size": 768}, 1, "64 tokens"),
    ({"runtime.distributed_timeout_s": 300}, 1, "resilience.hang_timeout_s 480 is not below"),
    ({"runtime.device": "cuda"}, 1, "runtime.precision is fp32 on a GPU"),
    (
        {"runtime.device": "cpu", "observe.profile_step_start": 1, "observe.record_memory_history": True},
        1,
        "observe.record_memory_history is true with runtime.device cpu",
    ),
]

OUT_OF_BOUNDS = {
    "runtime.num_threads": -1,
    "runtime.distributed_timeout_s": 0,
    "parallel.tensor_model_parallel_size": 0,
    "parallel.context_parallel_size": 0,
    "parallel.bucket_size": 0,
    "parallel.recompute_num_layers": 0,
    "vocab.codebook_size": 0,
    "vocab.text_tokenizer": "",
    "model.num_layers": 0,
    "model.hidden_size": -1,
    "model.ffn_hidden_size": 0,
    "model.num_attention_heads": 0,
    "model.num_query_groups": 0,
    "model.kv_channels": 63,
    "model.rotary_base": 0.0,
    "model.attention_dropout": 1.5,
    "model.hidden_dropout": 1.0,
    "objective.vision_loss_weight": -1.0,
    "optim.lr": -1.0,
    "optim.min_lr": -1e-9,
    "optim.lr_warmup_steps": -5,
    "optim.lr_decay_steps": 0,
    "optim.weight_decay": -5.0,
    "optim.adam_beta1": 2.0,
    "optim.adam_beta2": 1.0,
    "optim.adam_eps": 0.0,
    "optim.clip_grad": -1.0,
    "train.seq_length": 0,
    "train.micro_batch_size": 0,
    "train.global_batch_size": -4,
    "train.global_batch_size_ramp": (1, 0, 10),
    "train.train_steps": 0,
    "train.exit_interval": -3,
    "train.exit_duration": -0.5,
    "train.manual_gc_interval": -1,
    "train.seed": -1,
    "train.eval_interval": -1,
    "train.eval_steps": 0,
    "data.document_alignment": 0,
    "data.packing_seed": 2**63,
    "data.max_bad_fraction": 7.0,
    "data.cache_dir": "",
    "checkpoint.save_interval": 0,
    "checkpoint.keep": 0,
    "checkpoint.keep_every": 0,
    "checkpoint.save_timeout_s": 0.0,
    "checkpoint.init_from": "",
    "resilience.spike_factor": 1.0,
    "resilience.spike_window": 0,
    "resilience.max_bad_steps": -1,
    "resilience.pass_over_batches": 0,
    "resilience.hang_timeout_s": -1.0,
    "resilience.slow_step_factor": 0.5,
    "resilience.replica_check_interval": -1,
    "resilience.rank_times_interval": -1,
    "resilience.notify": "",
    "observe.run_dir": "",
    "observe.log_interval": 0,
    "observe.wandb_project": "",
    "observe.profile_step_start": 0,
    "observe.profile_step_end": 0,
    "observe.profile_ranks": (0, -1),
}
"""A value of every field that has bounds, out of them."""

CONTRADICTIONS = [
    ({"runtime.device": "cpu", "runtime.precision": "fp8"}, "runtime.precision is fp8, which needs a GPU"),
    ({"parallel.sequence_parallel": True}, "parallel.sequence_parallel is true with"),
    ({"parallel.overlap_param_gather": True}, "parallel.overlap_param_gather is true with"),
    ({"parallel.bucket_size": 10**6}, "parallel.bucket_size 1000000 with parallel.overlap_grad_reduce false"),
    ({"parallel.recompute_granularity": "full"}, "parallel.recompute_granularity full with"),
    ({"parallel.recompute_granularity": "selective", "parallel.recompute_method": "block"}, "parallel.recompute_granu"),
    ({"parallel.recompute_num_layers": 1}, "parallel.recompute_granularity None with"),
    ({"vocab.layout": "custom", "vocab.codebook_size": 5}, "vocab.text_tokenizer is empty"),
    ({"vocab.layout": "custom", "vocab.text_tokenizer": "x"}, "vocab.codebook_size is empty"),
    ({"vocab.codebook_size": 5}, "vocab.codebook_size 5: it is fixed by vocab.layout emu3"),
    ({"model.num_attention_heads": 3}, "model.num_attention_heads 3 is not a multiple of model.num_query_groups 2"),
    ({"objective.vision_loss_weight": 0.12345678}, "objective.vision_loss_weight 0.12345678: must be a fraction k/n"),
    ({"objective.vision_loss_weight": 1 / 101}, "objective.vision_loss_weight 0.00990099009900990"),
    ({"optim.min_lr": 1.0}, "optim.min_lr 1.0 is above optim.lr 5e-05"),
    ({"optim.lr_warmup_steps": 4, "optim.lr_decay_steps": 4}, "optim.lr_warmup_steps 4 is not below optim.lr_decay"),
    ({"data.train": (DatasetConfig(prefix="s3://a/b"),)}, "data.cache_dir is empty and data.train begins with 's3:"),
    ({"checkpoint.init_optimizer": True}, "checkpoint.init_optimizer is true without checkpoint.init_from"),
    ({"observe.profile_step_end": 5}, "observe.profile_step_start None and observe.profile_step_end 5"),
    ({"observe.profile_step_start": 5, "observe.profile_step_end": 5}, "observe.profile_step_start 5 and"),
    ({"observe.record_memory_history": True}, "observe.record_memory_history is true without"),
]


def change(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """`config` with other values; all of a section change at once."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, field = name.split(".")
        sections.setdefault(section, {})[field] = value
    changed = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **changed)


@pytest.mark.parametrize(("name", "value"), OUT_OF_BOUNDS.items())
def test_a_section_out_of_its_bounds_cannot_be_made(name, value):
    with pytest.raises(InputError) as error:
        change(GOOD, {name: value})
    shown = list(value) if isinstance(value, tuple) else repr(value)
    assert str(error.value).startswith(f"{name} {shown}: must be ")
    assert "\n" not in str(error.value)


def test_every_bound_of_a_run_is_tried():
    bounded = {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(RunConfig)
        for field in dataclasses.fields(getattr(GOOD, section.name))
        if "Annotated" in repr(field.type)
    }
    assert bounded == OUT_OF_BOUNDS.keys()


@pytest.mark.parametrize(("changes", "told"), CONTRADICTIONS)
def test_a_section_that_contradicts_itself_cannot_be_made(changes, told):
    with pytest.raises(InputError) as error:
        change(GOOD, changes)
    assert str(error.value).startswith(told)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("changes", "world_size", "named"), BROKEN)
def test_broken(changes, world_size, named):
    with pytest.raises(InputError) as error:
        validate(change(GOOD, changes), world_size)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_every_rule_is_broken_by_one_row_of_the_table():
    rows = [(change(GOOD, changes), world_size) for changes, world_size, _ in BROKEN]
    first_broken = {next(rule for rule in RULES if rule.broken(config, size)) for config, size in rows}
    assert first_broken == set(RULES)


def test_every_broken_rule_is_listed():
    changes = {"parallel.tensor_model_parallel_size": 2, "train.micro_batch_size": 3, "data.train": ()}
    messages = [rule.message(change(GOOD, changes), 1) for rule in broken_rules(change(GOOD, changes), 1)]
    assert len(messages) == 3
    for name, message in zip(changes, messages, strict=True):
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
    "changes",
    [
        {"optim.lr_decay_style": "constant", "optim.min_lr": 1.0},
        {"optim.lr_decay_style": "constant", "optim.lr_warmup_steps": 99},
        {"optim.lr_warmup_steps": 5, "optim.lr_decay_steps": 99},
        {"optim.lr": 0.0, "optim.clip_grad": 0.0, "optim.weight_decay": 0.0, "optim.adam_beta1": 0.0},
        {"objective.vision_loss_weight": 0.0},
        {"objective.vision_loss_weight": 1 / 3},
        {"train.exit_duration": 0.0, "resilience.hang_timeout_s": 0.0, "resilience.max_bad_steps": 0},
        {"data.max_bad_fraction": 1.0},
        {"parallel.overlap_grad_reduce": True, "parallel.bucket_size": 1},
        {"observe.profile_step_start": 3, "observe.profile_ranks": ()},
        {"data.train": (DatasetConfig(prefix="a"), DatasetConfig(prefix="s3://b/c"))},
    ],
)
def test_what_is_at_the_edge_is_taken(changes):
    assert validate(change(GOOD, changes), 1) is None


def test_the_smallest_share_of_a_blend_is_exact():
    """A dataset gets a window of a period where it has a share of 1/LONGEST_PERIOD, decimal fractions as written."""
    large = DatasetConfig(prefix="a", weight=0.9999)
    assert DataConfig(train=(large, DatasetConfig(prefix="b", weight=0.0001)))
    for name in ("train", "valid"):
        with pytest.raises(InputError, match=f"^data.{name}: weight 9.9e-05 of 'b' is less than 1/{LONGEST_PERIOD}"):
            DataConfig(**{name: (large, DatasetConfig(prefix="b", weight=0.000099))})

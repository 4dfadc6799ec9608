"""Narrowing a configuration keeps its layout, and what cannot be laid out stays so."""

import dataclasses

import pytest

from megatron_ext.config.data import DataConfig, DatasetConfig
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.observe import ObserveConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.run import RunConfig
from megatron_ext.config.train import TrainConfig
from megatron_ext.config.validate import validate
from megatron_ext.plan import DecoderShape
from megatron_ext.train.verify import narrow

EMU3_STAGE_2 = RunConfig(
    parallel=ParallelConfig(tensor_model_parallel_size=8, context_parallel_size=4, sequence_parallel=True),
    model=ModelConfig(preset="emu3_8b"),
    train=TrainConfig(seq_length=131072, micro_batch_size=1, global_batch_size=64, train_steps=1000),
    data=DataConfig(train=(DatasetConfig(prefix="x"),), document_alignment=64),
    observe=ObserveConfig(run_dir="unused"),
)
WORLD_SIZE = 64


def test_the_layout_stays_and_the_model_shrinks():
    small = narrow(EMU3_STAGE_2, WORLD_SIZE, steps=5)
    validate(small, WORLD_SIZE)
    for section in ("parallel", "runtime", "vocab", "objective", "data"):
        assert getattr(small, section) == getattr(EMU3_STAGE_2, section)
    assert small.train.seq_length == 64 * 8 * 4, "64 ids on each rank"
    assert (small.train.global_batch_size, small.train.train_steps) == (2 * 2, 5), "two data ranks, two microbatches"
    shape = DecoderShape.of(small.model)
    assert (shape.num_layers, shape.hidden_size, shape.kv_channels) == (2, 128, 128)
    assert (shape.num_attention_heads, shape.num_query_groups, shape.ffn_hidden_size) == (16, 8, 8 * 128)
    assert (shape.attention_dropout, shape.hidden_dropout) == (0.0, 0.0)


def test_buckets_stay_several_and_padded():
    """At a width that 128 divides none would be padded, and megatron-core's own size would be one bucket."""
    parallel = dataclasses.replace(EMU3_STAGE_2.parallel, overlap_grad_reduce=True, bucket_size=10**7)
    small = narrow(dataclasses.replace(EMU3_STAGE_2, parallel=parallel), WORLD_SIZE, steps=5)
    validate(small, WORLD_SIZE)
    assert small.parallel == dataclasses.replace(parallel, bucket_size=1)
    assert DecoderShape.of(small.model).hidden_size == 96


def test_a_small_model_keeps_its_shape():
    model = ModelConfig(num_layers=1, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, num_query_groups=2)
    train = dataclasses.replace(EMU3_STAGE_2.train, seq_length=36, micro_batch_size=2, global_batch_size=2)
    config = dataclasses.replace(EMU3_STAGE_2, model=model, train=train, parallel=ParallelConfig())
    small = narrow(config, 1, steps=5)
    assert dataclasses.replace(small.model, attention_dropout=None, hidden_dropout=None) == model
    assert dataclasses.replace(small.train, train_steps=1000) == train


@pytest.mark.parametrize(("alignment", "length"), [(64, 3072), (3072, 3072), (6144, 6144)])
def test_windows_are_halved_only_while_every_rule_holds(alignment, length):
    config = dataclasses.replace(
        EMU3_STAGE_2,
        train=dataclasses.replace(EMU3_STAGE_2.train, seq_length=6144),
        data=dataclasses.replace(EMU3_STAGE_2.data, document_alignment=alignment),
    )
    assert narrow(config, WORLD_SIZE, steps=5).train.seq_length == length


@pytest.mark.parametrize("name", ["num_query_groups", "ffn_hidden_size"])
def test_a_size_that_does_not_divide_is_left_for_the_model_to_refuse(name):
    model = ModelConfig(preset="emu3_8b", **{name: 12, "num_attention_heads": 24})
    small = narrow(dataclasses.replace(EMU3_STAGE_2, model=model), WORLD_SIZE, steps=5)
    assert getattr(small.model, name) == 12

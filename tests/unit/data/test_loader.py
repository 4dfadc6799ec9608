"""Global batches: the same windows for every layout, and nothing to remember between steps."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from megatron_ext.config import InputError
from megatron_ext.config.data import DataConfig, DatasetConfig
from megatron_ext.config.train import TrainConfig
from megatron_ext.data import build_data, context_indices
from tests.unit.data.samples import picture, random_dataset, write_dataset

TRAIN = TrainConfig(seq_length=64, micro_batch_size=1, global_batch_size=8, train_steps=10, seed=1)


@dataclass(frozen=True)
class Place:
    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    context_parallel_rank: int = 0
    context_parallel_size: int = 1


@pytest.fixture(scope="module")
def config(tmp_path_factory, vocabulary) -> DataConfig:
    folder = tmp_path_factory.mktemp("data")
    prefixes = [str(random_dataset(folder / f"set{seed}", vocabulary, seed=seed)) for seed in range(3)]
    return DataConfig(
        train=(DatasetConfig(prefix=prefixes[0], weight=0.75), DatasetConfig(prefix=prefixes[1], weight=0.25)),
        valid=(DatasetConfig(prefix=prefixes[2]),),
        document_alignment=8,
    )


def test_too_many_documents_that_do_not_fit_stop(tmp_path, vocabulary):
    rng = np.random.default_rng(0)
    documents = [[picture(rng, 8, 8)] if number < 2 else [picture(rng)] for number in range(8)]
    dataset = DatasetConfig(prefix=str(write_dataset(tmp_path / "set", vocabulary, documents)))
    lenient = DataConfig(train=(dataset,), max_bad_fraction=0.25)
    summary = build_data(lenient, TRAIN, vocabulary, Place()).train.summary(8)
    assert summary[1] == "set: 2 documents skipped, a picture or frame exceeds a window: key/0, key/1"
    message = r"set: 2 of 8 documents .* train.seq_length 64, more than data.max_bad_fraction 0.24 \(key/0, key/1\)"
    with pytest.raises(InputError, match=message):
        build_data(replace(lenient, max_bad_fraction=0.24), TRAIN, vocabulary, Place())


def windows(batch, place: Place) -> torch.Tensor:
    return batch.tokens_BT.reshape(batch.num_windows, -1) if place.context_parallel_size == 1 else batch.tokens_BT


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_step_has_the_same_windows_in_every_layout(config, vocabulary, size, micro_batch_size):
    reference = build_data(config, TRAIN, vocabulary, Place()).train
    train = replace(TRAIN, micro_batch_size=micro_batch_size)
    places = [Place(data_parallel_rank=rank, data_parallel_size=size) for rank in range(size)]
    loaders = [build_data(config, train, vocabulary, place).train for place in places]
    for consumed in (0, 8, 800):
        expected = torch.cat([batch.tokens_BT for batch in reference.microbatches(consumed)])
        by_rank = [loader.microbatches(consumed) for loader in loaders]
        assert all(len(batches) == 8 // size // micro_batch_size for batches in by_rank)
        in_order = [batch for step in zip(*by_rank, strict=True) for batch in step]  # microbatch first, then rank
        torch.testing.assert_close(torch.cat([windows(batch, places[0]) for batch in in_order]), expected)


def test_context_ranks_share_the_rows(config, vocabulary):
    whole = build_data(config, TRAIN, vocabulary, Place()).train.microbatches(8)
    for rank in range(4):
        place = Place(context_parallel_rank=rank, context_parallel_size=4)
        for row, part in zip(whole, build_data(config, TRAIN, vocabulary, place).train.microbatches(8), strict=True):
            indices = context_indices(row.cu_seqlens, rank, 4)
            assert torch.equal(part.tokens_BT, row.tokens_BT[:, indices])
            assert torch.equal(part.label_mask_BT, row.label_mask_BT[:, indices])


def test_any_step_without_those_before_it(config, vocabulary):
    loader = build_data(config, TRAIN, vocabulary, Place()).train
    walked = [[batch.tokens_BT for batch in loader.microbatches(8 * step)] for step in range(12)]
    fresh = build_data(config, TRAIN, vocabulary, Place()).train
    for step in (11, 3, 7):
        for batch, expected in zip(fresh.microbatches(8 * step), walked[step], strict=True):
            assert torch.equal(batch.tokens_BT, expected)
    assert fresh.identity == loader.identity
    other = build_data(config, replace(TRAIN, seed=2), vocabulary, Place()).train
    assert other.identity != loader.identity
    assert not torch.equal(other.microbatches(0)[0].tokens_BT, walked[0][0])


def test_shares_names_and_keys(config, vocabulary):
    data = build_data(config, TRAIN, vocabulary, Place())
    assert data.train.dataset_names == ("set0", "set1") and data.valid.dataset_names == ("set2",)
    batches = data.train.microbatches(16)
    assert sum(int(batch.dataset_BT[0, 0]) for batch in batches) == 2, "a quarter of 8 windows, in every period of 4"
    keys = data.train.keys(16)
    assert len(keys) == 8 and all(key.startswith("key/") for window in keys for key in window)
    first, second = data.train.summary(samples=800)
    assert first.startswith("set0: 60 documents in ") and "75.00% of the windows" in first


def test_names_fall_back_to_whole_prefixes(config, vocabulary, tmp_path):
    twin = DatasetConfig(prefix=str(random_dataset(tmp_path / "set0", vocabulary, seed=5)))
    data = build_data(replace(config, train=(*config.train, twin)), TRAIN, vocabulary, Place())
    assert data.train.dataset_names == tuple(dataset.prefix for dataset in (*config.train, twin))


def test_no_held_out_data(config, vocabulary):
    assert build_data(replace(config, valid=()), TRAIN, vocabulary, Place()).valid is None


def test_two_vision_tokenizers_are_refused(config, vocabulary, tmp_path):
    other = write_dataset(tmp_path / "x", vocabulary, [[picture(np.random.default_rng(0))]], vision_tokenizer="ffff")
    blend = (*config.train, DatasetConfig(prefix=str(other)))
    with pytest.raises(InputError, match="made by vision tokenizer 0123456789abcdef, .*x by ffff"):
        build_data(replace(config, train=blend), TRAIN, vocabulary, Place())
    with pytest.raises(InputError, match="vision tokenizer"):
        build_data(replace(config, valid=(DatasetConfig(prefix=str(other)),)), TRAIN, vocabulary, Place())

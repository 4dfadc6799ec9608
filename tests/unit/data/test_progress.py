"""Blends that change between restarts: what stays goes on, what is new begins, nothing is read twice in an epoch."""

import json
from collections import Counter
from dataclasses import asdict, replace

import pytest

from megatron_ext.config import InputError
from megatron_ext.config.data import DataConfig, DatasetConfig
from megatron_ext.data import build_data
from megatron_ext.data.progress import BlendProgress
from tests.unit.data.samples import random_dataset
from tests.unit.data.test_loader import TRAIN, Place


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory, vocabulary) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    return [str(random_dataset(folder / f"set{seed}", vocabulary, seed=seed)) for seed in range(3)]


@pytest.fixture
def begin(prefixes, vocabulary):
    """A run's data from weights by number of dataset."""

    def begin(weights: dict[int, float], seed: int = 1, alignment: int = 8):
        datasets = tuple(DatasetConfig(prefix=prefixes[number], weight=weight) for number, weight in weights.items())
        config = DataConfig(train=datasets, document_alignment=alignment)
        return build_data(config, replace(TRAIN, seed=seed), vocabulary, Place())

    return begin


def read(data, first: int, last: int) -> list[tuple[str, int]]:
    """(dataset, window) of the samples of steps of 8 from `first` to `last`."""
    loader = data.train
    return [
        (loader.dataset_names[dataset], window)
        for consumed in range(first, last, 8)
        for ((dataset, window),) in loader.places(consumed)
    ]


def saved(data, samples: int) -> BlendProgress:
    """As a checkpoint holds it."""
    return BlendProgress.from_dict(json.loads(json.dumps(asdict(data.train.progress(samples)))))


def test_progress_counts_the_windows_read(begin):
    data = begin({0: 0.75, 1: 0.25})
    counts = Counter(name for name, _ in read(data, 0, 104))
    assert {dataset.name: dataset.consumed for dataset in saved(data, 104).datasets} == counts
    assert sum(counts.values()) == 104


def test_an_unchanged_blend_goes_on_in_its_order(begin):
    data = begin({0: 0.75, 1: 0.25})
    resumed = begin({0: 0.75, 1: 0.25}).resumed(saved(data, 104), 104, allow_change=False)
    assert resumed.change is None and resumed.train.identity == data.train.identity
    assert read(resumed, 104, 400) == read(data, 104, 400)
    assert saved(resumed, 200) == saved(data, 200)


def test_other_weights_go_on_with_each_datasets_next_window(begin):
    data = begin({0: 0.75, 1: 0.25})
    resumed = begin({0: 0.25, 1: 0.75}).resumed(saved(data, 24), 24, allow_change=False)
    assert resumed.change.sample == 24 and resumed.change.shares == {"set0": 0.25, "set1": 0.75}
    assert resumed.change.shares_before == {"set0": 0.75, "set1": 0.25}
    assert resumed.train.identity != begin({0: 0.25, 1: 0.75}).train.identity
    after = read(resumed, 24, 424)
    assert Counter(name for name, _ in after) == {"set0": 100, "set1": 300}
    for number, name in enumerate(("set0", "set1")):
        windows = [window for dataset, window in read(data, 0, 24) + after if dataset == name]
        # The order in which a dataset is read does not depend on the weights: only how fast it is.
        assert windows == [window for dataset, window in read(data, 0, 2000) if dataset == name][: len(windows)]
        assert len(windows) > 2 * len(data.train.datasets[number]), "that was more than one epoch"
    # A second change, and a restart without one.
    again = begin({0: 0.5, 1: 0.5}).resumed(saved(resumed, 424), 424, allow_change=False)
    same = begin({0: 0.5, 1: 0.5}).resumed(saved(again, 480), 480, allow_change=False)
    assert again.change.sample == 424 and same.change is None
    assert read(same, 480, 560) == read(again, 480, 560)


def test_a_dataset_that_comes_or_goes_needs_permission(begin):
    progress = saved(begin({0: 0.5, 1: 0.5}), 40)
    for weights, named in (
        ({0: 0.5, 2: 0.5}, "the run has not read set2; it has read set1, which data.train lacks"),
        ({0: 0.5}, "has changed: it has read set1, which data.train lacks: go on"),
        ({0: 0.5, 1: 0.25, 2: 0.25}, "has changed: the run has not read set2: go on"),
    ):
        with pytest.raises(InputError, match=named) as refusal:
            begin(weights).resumed(progress, 40, allow_change=False)
        assert "data.allow_change true" in str(refusal.value) and "\n" not in str(refusal.value)
    with pytest.raises(InputError, match="set0, set1 has other windows than it had: go on"):
        begin({0: 0.5, 1: 0.5}, alignment=1).resumed(progress, 40, allow_change=False)
    with pytest.raises(InputError, match="train.seed is 2, the run began with 1"):
        begin({0: 0.5, 1: 0.5}, seed=2).resumed(progress, 40, allow_change=True)


def test_datasets_come_go_and_come_back(begin):
    data = begin({0: 0.5, 1: 0.5})
    without = begin({1: 0.5, 2: 0.5}).resumed(saved(data, 40), 40, allow_change=True)
    assert without.change.added == ("set2",) and without.change.removed == ("set0",)
    back = begin({0: 0.5, 1: 0.5}).resumed(saved(without, 80), 80, allow_change=True)
    assert back.change.added == ("set0",) and back.change.removed == ("set2",)
    history = read(data, 0, 40) + read(without, 40, 80) + read(back, 80, 400)
    straight = read(data, 0, 2000)
    for name in ("set0", "set1"):
        windows = [window for dataset, window in history if dataset == name]
        assert windows == [window for dataset, window in straight if dataset == name][: len(windows)], name
    numbers = {dataset.name: dataset.number for dataset in saved(back, 400).datasets}
    assert numbers == {"set0": 0, "set1": 1, "set2": 2}


def test_a_checkpoint_that_does_not_say_needs_permission(begin):
    data = begin({0: 1.0})
    assert data.resumed(None, 0, allow_change=False) is data
    assert data.resumed(None, 8, allow_change=True) is data
    with pytest.raises(InputError, match="has consumed 8 samples and does not say of which datasets: set data.allow"):
        data.resumed(None, 8, allow_change=False)

"""Counting and judging a whole dataset: what is counted by hand, in runs and by threads of any number."""

import numpy as np
import pytest

from megatron_ext.data import DocumentDataset
from megatron_ext.data import survey as surveying
from megatron_ext.data.survey import Lengths, count_ids, judge, read_run, runs
from megatron_ext.vocab import Grammar
from tests.unit.data.samples import random_dataset


@pytest.fixture
def dataset(tmp_path, vocabulary, monkeypatch) -> DocumentDataset:
    """200 documents in dozens of runs, so that their order matters."""
    monkeypatch.setattr(surveying, "RUN_IDS", 200)
    return DocumentDataset(random_dataset(tmp_path / "set", vocabulary, count=200), vocabulary)


def test_runs_cover_all_documents_once(dataset):
    seen = list(runs(dataset.lengths, 200))
    assert len(seen) > 20
    assert [begin for begin, _ in seen] == [0, *(end for _, end in seen[:-1])] and seen[-1][1] == len(dataset)
    ids_N, length_D = read_run(dataset, *seen[3])
    apart = [dataset.ids(document) for document in range(*seen[3])]
    assert np.array_equal(ids_N, np.concatenate(apart)) and length_D.tolist() == [len(ids) for ids in apart]


@pytest.mark.parametrize("workers", [1, 3])
def test_counts_and_verdict(dataset, vocabulary, workers):
    layout = vocabulary.layout
    ids = np.concatenate([dataset.ids(document) for document in range(len(dataset))])
    expected = (int((ids < layout.text_size).sum()), int(layout.is_visual(ids).sum()))
    told = []
    judged = judge(dataset, workers, told.append)
    assert judged.counts == (*expected, len(ids) - sum(expected)) and judged.wrong == 0 and not judged.first
    assert sum(told) == len(ids) and count_ids(dataset, workers, told.append) == judged.counts


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_offences_are_named_in_order(dataset, vocabulary, workers, monkeypatch):
    monkeypatch.setattr(surveying, "MOST_NAMED", 4)
    ends = np.cumsum(dataset.lengths, dtype=np.int64)
    wrong = [3, 17, 60, 61, 140, 199]
    with open(f"{dataset.prefix}.bin", "r+b") as file:
        content = np.memmap(file, dtype=np.int32, mode="r+")
        content[ends[wrong] - 1] = vocabulary.layout.pad  # where EOS was
        content.flush()
    damaged = DocumentDataset(dataset.prefix, vocabulary)
    judged = judge(damaged, workers, lambda count: None)
    assert judged.wrong == len(wrong) and [offence.document for offence in judged.first] == wrong[:4]
    for offence in judged.first:
        violation = Grammar(vocabulary).validate(damaged.ids(offence.document))
        assert (offence.position, offence.reason) == violation
        assert str(offence).startswith(f"document {offence.document} (key/{offence.document}) at position ")


def test_of_a_large_dataset_a_sample_is_counted(dataset, monkeypatch):
    whole = count_ids(dataset, 1, lambda count: None)
    monkeypatch.setattr(surveying, "COUNTED_IDS", sum(whole) // 4)
    sample = count_ids(dataset, 1, lambda count: None)
    assert 0.1 < sum(sample) / sum(whole) < 0.4
    for part, of_all in zip(sample, whole, strict=True):
        assert part / sum(sample) == pytest.approx(of_all / sum(whole), rel=0.4)


def test_lengths():
    lengths = Lengths.of(np.arange(1, 101, dtype=np.int32)[::-1])
    assert (lengths.shortest, lengths.percentiles, lengths.longest) == (1, (6, 51, 96), 100)

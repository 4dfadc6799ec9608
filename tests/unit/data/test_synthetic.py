"""Random documents are packed windows like those of a dataset."""

import numpy as np
import pytest

from megatron_ext.data import RandomDocuments
from megatron_ext.vocab import VocabLayout

LAYOUT = VocabLayout.custom(text_size=40, codebook_size=60)
S = 96


def documents(alignment: int, seed: int = 1) -> RandomDocuments:
    return RandomDocuments(name="x", layout=LAYOUT, seq_length=S, alignment=alignment, seed=seed)


@pytest.mark.parametrize("alignment", [1, 8, 96])
def test_windows_are_packed_documents(alignment):
    labels_per_window = set()
    for number in range(20):
        window = documents(alignment)[number]
        assert window.boundaries[0] == 0 and window.boundaries[-1] == S and not (window.boundaries % alignment).any()
        for begin, end in zip(window.boundaries, window.boundaries[1:], strict=False):
            labelled = int(window.mask[begin:end].sum())
            assert window.mask[begin : begin + labelled].all() and labelled < end - begin, "none after the last id"
            np.testing.assert_array_equal(
                window.labels[begin : begin + labelled], window.ids[begin + 1 : begin + labelled + 1]
            )
        labels = window.labels[window.mask]
        assert ((0 <= labels) & (labels < LAYOUT.size)).all()
        labels_per_window.add(len(labels))
    assert len(labels_per_window) > 5, "labels fall unevenly"


def test_both_modalities_in_about_equal_shares():
    labels = np.concatenate([window.labels[window.mask] for window in map(documents(1).__getitem__, range(20))])
    assert 0.4 < LAYOUT.is_visual(labels).mean() < 0.6


def test_a_function_of_seed_and_number():
    def ids(seed, number):
        return documents(1, seed)[number].ids

    np.testing.assert_array_equal(ids(1, 5), ids(1, 5))
    assert (ids(1, 5) != ids(1, 6)).any() and (ids(1, 5) != ids(2, 5)).any()

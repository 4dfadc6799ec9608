"""Batches on which parallel training goes wrong elsewhere: each layout still agrees with one process."""

import itertools

import numpy as np
import pytest

from megatron_ext.data.batch import Window
from tests.support.comparison import assert_same_history, assert_same_weights
from tests.support.decoding import LAYOUT, SEQ_LENGTH, walk

NUM_WINDOWS = 8
# Measured over all cases and layouts: 1.6e-7 and 4.9e-7.
LOSS_BOUND, WEIGHT_BOUND = 2e-6, 5e-6

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CP2, CP4 = {"context_parallel_size": 2}, {"context_parallel_size": 4}
LAYOUTS = {
    1: {"one": {}},
    2: {"cp2": CP2, "dp2": {}},
    4: {"cp4": CP4, "cp2_dp2": CP2, "tp2_sp_cp2": TP2_SP | CP2},
}


def window(seed: int, bounds: list[int], labelled: np.ndarray) -> Window:
    """Random ids with documents ending at `bounds`; labels at the positions `labelled`."""
    ids = np.random.default_rng(seed).integers(0, LAYOUT.size, SEQ_LENGTH)
    mask = np.zeros(SEQ_LENGTH, dtype=bool)
    mask[labelled] = True
    return Window(ids=ids, labels=np.roll(ids, -1), mask=mask, boundaries=np.array([0, *bounds]))


def one_document(seed: int, labelled: np.ndarray) -> Window:
    return window(seed, [SEQ_LENGTH], labelled)


def rank_without_labels(step: int) -> list[Window]:
    """Every label lies in the outer quarters of its window, which context rank 0 holds (of 4: ranks 0 and 1). The
    second window of each pair has none at all: with two data ranks, that is all that rank 1 gets."""
    outer = np.r_[0:8, 24 : SEQ_LENGTH - 1]
    return [one_document(100 * step + index, outer if index % 2 == 0 else np.arange(0)) for index in range(NUM_WINDOWS)]


def one_valid_token(step: int) -> list[Window]:
    """A single label in the whole global batch, away from rank 0."""
    return [
        one_document(100 * step + index, np.array([13] if index == 5 else [], dtype=int))
        for index in range(NUM_WINDOWS)
    ]


def uneven_weights(step: int) -> list[Window]:
    """Text labels for the outer quarters of even windows, visual ones (100 times lighter) for all else: the sums of
    weights differ between context ranks and between data ranks."""
    found = []
    for index in range(NUM_WINDOWS):
        labelled = np.arange(SEQ_LENGTH - 1) if index % 2 == 0 else np.arange(5)
        one = one_document(100 * step + index, labelled)
        rng = np.random.default_rng(step)
        labels = rng.integers(LAYOUT.visual_start, LAYOUT.size, SEQ_LENGTH)
        if index % 2 == 0:
            labels[np.r_[0:8, 24:SEQ_LENGTH]] = rng.integers(0, LAYOUT.text_size, 16)
        found.append(Window(ids=one.ids, labels=labels, mask=one.mask, boundaries=one.boundaries))
    return found


def documents_end_at_slices(step: int) -> list[Window]:
    """Documents end, with padding and without, exactly where the cut for two and for four context ranks falls: inside
    their own segment (scope document) and inside the window (scope window). The last label before such a cut is the
    id behind it, on another rank, and must be masked; the labels of the ids before the cuts inside a document cross
    it, and must not."""
    bounds = [8, 16, 32]
    real = [4, 8, 8]  # halves of the first and the last segment, and all of the second
    labelled = np.concatenate(
        [start + np.arange(length - 1) for start, length in zip([0, *bounds], real, strict=False)]
    )
    return [window(100 * step + index, bounds, labelled) for index in range(NUM_WINDOWS)]


CASES = {
    "rank_without_labels": {"windows": rank_without_labels},
    "one_valid_token": {"windows": one_valid_token},
    "uneven_weights": {"windows": uneven_weights, "vision_loss_weight": 0.01},
    "documents_end_at_slices": {"windows": documents_end_at_slices},
    "documents_end_at_slices_window": {"windows": documents_end_at_slices, "scope": "window"},
}
STEPS = 2


@pytest.fixture(scope="module")
def trained(ranks):
    """(case, layout) -> (history, weights) of rank 0."""
    found = {}
    for world_size, layouts in LAYOUTS.items():
        names = [(case, layout) for case in CASES for layout in layouts]
        trainings = [(layouts[layout], CASES[case] | {"steps": STEPS}) for case, layout in names]
        found |= dict(zip(names, ranks.run(walk, world_size, trainings)[0], strict=True))
    return found


def check(case: str, trained) -> list[dict[str, float]]:
    """Every layout against one process, whose history is returned."""
    expected_history, expected_weights = trained[case, "one"]
    for layout in itertools.chain(*LAYOUTS.values()):
        history, weights = trained[case, layout]
        assert_same_history(history, expected_history, LOSS_BOUND)
        assert_same_weights(weights, expected_weights, WEIGHT_BOUND)
    return expected_history


def test_a_rank_whose_labels_are_all_masked(trained):
    history = check("rank_without_labels", trained)
    assert all(np.isnan(step["loss_dataset/b"]) and step["grad_norm"] > 0 for step in history)


def test_one_valid_token_in_the_whole_batch(trained):
    history = check("one_valid_token", trained)
    for step in history:
        of_modality = step["loss_text"] if np.isnan(step["loss_vision"]) else step["loss_vision"]
        assert step["loss"] == of_modality == step["loss_dataset/b"] and step["grad_norm"] > 1


def test_weights_of_labels_that_differ_between_ranks(trained):
    for step in check("uneven_weights", trained):
        # 64 text labels weigh 100, 64 visual ones and the 20 of the odd windows 1: the loss is nearly that of the text.
        assert step["loss"] == pytest.approx(step["loss_text"], rel=0.02)


@pytest.mark.parametrize("scope", ["", "_window"])
def test_a_document_that_ends_where_the_context_slice_does(scope, trained):
    check(f"documents_end_at_slices{scope}", trained)

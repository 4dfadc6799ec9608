"""The walk in bf16: every layout stays within a bound of one process, and a wrong layout would not."""

import contextlib
import functools

import pytest

from tests.distributed.golden import TRAINING, sixteen_windows
from tests.support.comparison import assert_same_history
from tests.support.decoding import walk

SEED_STEPS, STEPS = 60, 5
# Measured over all layouts: 2.1e-4, 8.3e-4 and 9.2e-3 (the smallest parts of the gradient). Slices taken for contiguous
# ones: 0.4 and 3; unreduced gradients of keys and values: 2.9e-4 and 7e-3.
LOSS_BOUND, NORM_BOUND, PART_BOUND = 6e-4, 2.5e-3, 2e-2


def all_windows(step):
    """All 16 windows, as one global batch."""
    return [window for quarter in range(4) for window in sixteen_windows(4 * step + quarter)]


TP2, TP4 = {"tensor_model_parallel_size": 2}, {"tensor_model_parallel_size": 4}
CP2, CP4, SP = {"context_parallel_size": 2}, {"context_parallel_size": 4}, {"sequence_parallel": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    2: {"tp2": TP2, "tp2_sp": TP2 | SP, "cp2": CP2, "dp2": OVERLAP},
    4: {
        "tp4_sp": TP4 | SP, "cp4": CP4, "tp2_sp_cp2": TP2 | SP | CP2, "tp2_sp_dp2": TP2 | SP | OVERLAP, "cp2_dp2": CP2,
    },
}  # fmt: skip


@contextlib.contextmanager
def contiguous_slices():
    """Attention that takes the slices of the ranks for contiguous ones."""
    import torch

    from megatron_ext.model import cp_attention

    right = cp_attention.context_indices

    def wrong(cu_seqlens, rank, size):
        total = int(cu_seqlens[-1]) // size
        return torch.arange(rank * total, (rank + 1) * total)

    cp_attention.context_indices = wrong
    try:
        yield
    finally:
        cp_attention.context_indices = right


@contextlib.contextmanager
def unreduced_keys():
    """Gradients of keys and values that are not summed over the context axis."""
    from megatron_ext.model import cp_attention

    right = cp_attention.gather_from_sequence_parallel_region
    cp_attention.gather_from_sequence_parallel_region = functools.partial(right, tensor_parallel_output_grad=False)
    try:
        yield
    finally:
        cp_attention.gather_from_sequence_parallel_region = right


def walk_with(mistake, cases):
    with mistake():
        return walk(cases)


@pytest.fixture(scope="module")
def training(ranks, tmp_path_factory):
    """What every layout continues: 60 steps in fp32, after which the weights are far from noise."""
    folder = str(tmp_path_factory.mktemp("seed"))
    ranks.run(walk, 1, [({}, TRAINING | {"steps": SEED_STEPS, "folder": folder})])
    return TRAINING | {
        "windows": all_windows, "micro_batch_size": 4, "steps": SEED_STEPS + STEPS,
        "begin_with": folder, "precision": "bf16",
    }  # fmt: skip


@pytest.fixture(scope="module")
def one_process(ranks, training):
    """The history."""
    return ranks.run(walk, 1, [({}, training)])[0][0][0]


@pytest.fixture(scope="module")
def walked(ranks, training):
    """layout -> (history, weights)."""
    found = {}
    for world_size, layouts in LAYOUTS.items():
        results = ranks.run(walk, world_size, [(layout, training) for layout in layouts.values()])[0]
        found |= dict(zip(layouts, results, strict=True))
    return found


@pytest.mark.parametrize("layout", [layout for layouts in LAYOUTS.values() for layout in layouts])
def test_layout_agrees_with_one_process(layout, walked, one_process):
    history, _ = walked[layout]
    assert_same_history(history, one_process, LOSS_BOUND, NORM_BOUND, PART_BOUND)


@pytest.mark.parametrize("mistake", [contiguous_slices, unreduced_keys])
def test_the_bound_is_tight_enough_to_show_a_mistake(mistake, ranks, training, one_process):
    ((history, _),) = ranks.run(walk_with, 2, mistake, [(CP2, training)])[0]
    with pytest.raises(AssertionError, match=r"grad_norm|loss"):
        assert_same_history(history, one_process, LOSS_BOUND, NORM_BOUND, PART_BOUND)

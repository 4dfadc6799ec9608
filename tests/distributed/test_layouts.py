"""Every layout is the same training: losses, gradient norms and weights agree with one process."""

import functools
import itertools
from typing import Any

import pytest

from tests.distributed import table
from tests.support.comparison import assert_same_history, assert_same_weights
from tests.support.decoding import random_windows, walk

pytestmark = pytest.mark.timeout(900)  # the first test of a world size walks all of it

SEED_STEPS, STEPS = 2, 5
GROUPED = {"num_attention_heads": 8}
"""Two query heads share each of the four key-value heads, one of which is what a rank of four holds."""

# Measured over all rows: 2.7e-7 and 2.4e-7, the weights after 5 steps at lr 1e-2.
LOSS_BOUND, WEIGHT_BOUND = 3e-6, 3e-6
CASES = table.cases()


def options(scope: str, norm: str) -> dict[str, Any]:
    """What is trained, whatever the layout."""
    windows = functools.partial(random_windows, count=table.GLOBAL_BATCH)
    return {"scope": scope, "model": GROUPED | table.NORM[norm], "windows": windows, "micro_batch_size": 4}


@pytest.fixture(scope="module")
def seeds(ranks, tmp_path_factory):
    """Checkpoint folders, with and without QK norm, of which every training is the continuation: one process wrote
    weights, moments and norms that are no longer ones."""
    folders = {norm: str(tmp_path_factory.mktemp("seed")) for norm in table.NORM}
    several = table.OVERLAP["grads"] | table.BUCKETS["several"]
    ranks.run(
        walk,
        1,
        [(several, options("document", norm) | {"steps": SEED_STEPS, "folder": f}) for norm, f in folders.items()],
    )
    return folders


@pytest.fixture(scope="module")
def walk_world(ranks, seeds):
    """world size -> {case: (history, weights) of every rank}."""

    def walk_world(world_size: int) -> dict[table.Case, list[tuple]]:
        mine = [case for case in CASES if case.world_size == world_size]
        trainings = [
            options(*case.reference)
            | {"micro_batch_size": case.micro_batch_size(), "begin_with": seeds[case.norm], "steps": SEED_STEPS + STEPS}
            for case in mine
        ]
        by_rank = ranks.run(walk, world_size, [(case.parallel(), t) for case, t in zip(mine, trainings, strict=True)])
        return dict(zip(mine, zip(*by_rank, strict=True), strict=True))

    return walk_world


@pytest.fixture(scope="module")
def world_1(walk_world):
    return walk_world(1)


@pytest.fixture(scope="module")
def world_2(walk_world):
    return walk_world(2)


@pytest.fixture(scope="module")
def world_4(walk_world):
    return walk_world(4)


@pytest.fixture
def trained(case, request):
    """(history, weights) of every rank of `case`. Its world size is walked when the first of its cases is asked for."""
    return request.getfixturevalue(f"world_{case.world_size}")[case]


@pytest.fixture(scope="module")
def references(ranks, seeds):
    """(scope, norm) -> (history, weights) of one process that recomputes and overlaps nothing."""
    kinds = list(itertools.product(("document", "window"), table.NORM))
    trainings = [options(*kind) | {"begin_with": seeds[kind[1]], "steps": SEED_STEPS + STEPS} for kind in kinds]
    return dict(zip(kinds, ranks.run(walk, 1, [({}, training) for training in trainings])[0], strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout_agrees_with_one_process(case, trained, references):
    history, weights = trained[0]
    expected_history, expected_weights = references[case.reference]
    assert len(history) == STEPS
    assert_same_history(history, expected_history, LOSS_BOUND)
    assert_same_weights(weights, expected_weights, WEIGHT_BOUND)


@pytest.mark.parametrize("case", [case for case in CASES if case.world_size > 1], ids=str)
def test_replicas_stay_equal_bit_for_bit(case, trained):
    (history, weights), *others = trained
    for other_history, other_weights in others:
        assert other_history == history
        assert_same_weights(other_weights, weights, 0)


def test_every_pair_of_values_meets_in_a_row():
    combinations = (table.Case(*values) for values in itertools.product(*table.FACTORS.values()))
    possible = [case for case in combinations if table.is_possible(case)]
    missing = set().union(*(case.pairs() for case in possible)) - set().union(*(case.pairs() for case in CASES))
    assert not missing, sorted(map(sorted, missing))
    assert all(table.is_possible(case) for case in CASES) and len(set(CASES)) == len(CASES)

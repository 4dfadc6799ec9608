"""The bounds that benchmarks/packing.py prints: never above what is possible."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.packing_bound import bound_of_documents, bound_of_pieces, fewest_windows
from megatron_ext.data.packing import PackingRules, Spans, pack
from tests.unit.data.test_packing import corpora


def optimum(sizes: list[int], capacity: int) -> int:
    """Fewest windows of a few items, by trying all placements."""
    best = len(sizes)

    def place(number: int, rooms: tuple[int, ...]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if number == len(sizes):
            best = len(rooms)
            return
        size = sizes[number]
        for room in {room for room in rooms if room >= size}:
            place(number + 1, tuple(sorted([*rooms[: (k := rooms.index(room))], room - size, *rooms[k + 1 :]])))
        place(number + 1, tuple(sorted([*rooms, capacity - size])))

    place(0, ())
    return best


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_no_packing_beats_the_bound(sizes):
    bound = fewest_windows(np.bincount(sizes, minlength=21), 0, 20)
    assert bound <= optimum(sorted(sizes, reverse=True), 20)


@given(corpora())
@settings(max_examples=200, deadline=None)
def test_no_fill_is_above_the_bounds(corpus):
    lengths, spans, rules = corpus
    index = pack(*corpus)
    if len(index):
        fill = index.fill(rules.seq_length)
        assert fill <= bound_of_pieces(index, rules) <= 1
        assert fill <= bound_of_documents(lengths, spans, rules) <= 1


def test_each_bound_is_the_best_one_somewhere():
    def bound(sizes: list[int], capacity: int) -> int:
        return fewest_windows(np.bincount(sizes, minlength=capacity + 1), 0, capacity)

    assert bound([5] * 4, 10) == 2, "volume"
    assert bound([8] * 4 + [3] * 3, 10) == 5, (
        "nothing fits beside an 8: three of 3 need a window more (Martello & Toth)"
    )
    assert bound([34] * 6, 100) == 3, "only two of 34 share a window (dual feasible function, k = 2)"


def test_what_may_be_cut_is_dust():
    """Window 10: a picture of 7 and a text of 3 or of 12 fill their windows; a text of 5 does not, unless it is cut."""
    picture = [[1, 6]]

    def bound(lengths: list[int], spans: list, shortest_cut: int = 0) -> float:
        rules = PackingRules(seq_length=10, shortest_cut=shortest_cut)
        return bound_of_documents(np.array(lengths), Spans.join(spans), rules)

    assert bound([7, 3], [picture, []]) == 1
    assert bound([7, 13], [picture, []]) == 1
    assert bound([7, 7, 6], [picture, picture, []]) == 20 / 30
    assert bound([7, 7, 6], [picture, picture, []], shortest_cut=1) == 1
    assert bound([25, 4], [[[0, 12]], []]) == 4 / 10, "a span longer than a window: the document is not packed"

"""Packing: the C++ packer against its Python twin, and both against what packing must guarantee."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config import InputError
from megatron_ext.data.packing import PackingRules, Spans, pack, pack_reference


@st.composite
def corpora(draw):
    """Documents of alternating gaps and spans, and rules whose window is a multiple of their alignment."""
    alignment = draw(st.sampled_from([1, 2, 3, 8]))
    seq_length = alignment * draw(st.integers(1, 40 if draw(st.booleans()) else 3))
    part = st.integers(0, max(2, seq_length * 3 // 2))
    lengths, spans = [], []
    for _ in range(draw(st.integers(0, 30))):
        parts = draw(st.lists(part, min_size=1, max_size=6))
        ends = np.cumsum(parts)
        bounds = [(end - size, end) for i, (end, size) in enumerate(zip(ends, parts, strict=True)) if i % 2 and size]
        lengths.append(max(1, int(ends[-1])))
        spans.append(np.array(bounds).reshape(-1, 2))
    rules = PackingRules(
        seq_length=seq_length,
        alignment=alignment,
        shortest_cut=draw(st.sampled_from([0, 1, 5, 20])),
        seed=draw(st.integers(0, 2**63)),
        buffer_documents=draw(st.sampled_from([4, 1000])),
    )
    return np.array(lengths, dtype=np.int64), Spans.join(spans), rules


def assert_equal_indexes(found, expected):
    for name, array in expected.arrays().items():
        np.testing.assert_array_equal(found.arrays()[name], array, err_msg=name)
        assert found.arrays()[name].dtype == array.dtype


@given(corpora())
@settings(max_examples=400, deadline=None)
def test_cpp_equals_python(corpus):
    assert_equal_indexes(pack(*corpus), pack_reference(*corpus))


@given(corpora())
@settings(max_examples=200, deadline=None)
def test_guarantees(corpus):
    lengths, spans, rules = corpus
    index = pack(*corpus)
    covered = [np.zeros(length, dtype=int) for length in lengths]
    cuts = {document: {0, int(length)} for document, length in enumerate(lengths)}
    for document, start, length in index.pieces.tolist():
        assert length >= 1
        covered[document][start : start + length] += 1
        cuts[document] |= {start, start + length}
        if rules.shortest_cut and length < lengths[document] <= rules.seq_length:
            assert length >= rules.shortest_cut, "both sides of a cut that fills a window are worth reading"
    for document, times in enumerate(covered):
        own = spans.of(document)
        too_long = any(end - start > rules.seq_length for start, end in own)
        assert (document in index.skipped_documents) == too_long
        assert (times == (0 if too_long else 1)).all()
        if not too_long:
            assert not [c for c in cuts[document] for start, end in own if start < c < end]
            may_be_cut = lengths[document] > rules.seq_length or (rules.shortest_cut and not len(own))
            assert len(cuts[document]) == 2 or may_be_cut
    used = []
    for w in range(len(index)):
        pieces = slice(index.window_offsets[w], index.window_offsets[w + 1])
        assert list(index.piece_document[pieces]) == sorted(index.piece_document[pieces])
        used.append(int((-(-index.piece_length[pieces].astype(int) // rules.alignment) * rules.alignment).sum()))
        assert 0 < used[-1] <= rules.seq_length
    if len(lengths) <= rules.buffer_documents:
        # Best fit never opens a window while an open one has room: no two windows fit into one.
        assert sum(sorted(used)[:2]) > rules.seq_length or len(used) < 2


def test_a_known_packing():
    """Window of 10: 7+3, 6+4, 5 alone; the 3 goes to the room of 3, not to a larger one."""
    lengths = np.array([3, 5, 7, 4, 6])
    index = pack(lengths, Spans.join([[]] * 5), PackingRules(seq_length=10))
    windows = [index.piece_document[a:b].tolist() for a, b in itertools.pairwise(index.window_offsets)]
    assert windows == [[0, 2], [3, 4], [1]]
    assert index.fill(10) == 25 / 30


def test_long_documents_are_cut_before_a_picture():
    """Text of 25 around a picture at 8..13, window 10: the second piece starts with the picture."""
    index = pack(np.array([25]), Spans.join([np.array([[8, 13]])]), PackingRules(seq_length=10))
    pieces = sorted(zip(index.piece_start.tolist(), index.piece_length.tolist(), strict=True))
    assert pieces == [(0, 8), (8, 10), (18, 7)]


def test_alignment_takes_room():
    lengths, spans = np.array([5, 5]), Spans.join([[], []])
    assert len(pack(lengths, spans, PackingRules(seq_length=10))) == 1
    assert len(pack(lengths, spans, PackingRules(seq_length=10, alignment=10))) == 2


def test_texts_are_cut_to_fill_what_pictures_leave():
    """Window 10: pictures of 6 and 7 leave 4 and 3. A text of 4 goes whole, one of 9 is cut into 3 and 6; the text of 8
    would fill the room of 2 that the text of 6 might leave, but what a text leaves is not filled by cuts."""
    lengths = np.array([6, 7, 4, 9, 8])
    spans = Spans.join([[[1, 5]], [[1, 6]], [], [], []])
    rules = PackingRules(seq_length=10, shortest_cut=2)
    index = pack(lengths, spans, rules)
    windows = [index.pieces[a:b].tolist() for a, b in itertools.pairwise(index.window_offsets)]
    assert windows == [[[1, 0, 7], [3, 0, 3]], [[0, 0, 6], [2, 0, 4]], [[3, 3, 6]], [[4, 0, 8]]]
    assert index.cut_documents(lengths).tolist() == [3]
    assert len(pack(lengths, spans, PackingRules(seq_length=10)).cut_documents(lengths)) == 0


def test_buffers_are_drawn_by_the_seed():
    rng = np.random.default_rng(0)
    lengths, spans = rng.integers(1, 30, size=2000), Spans.join([[]] * 2000)

    def windows(seed):
        index = pack(lengths, spans, PackingRules(seq_length=40, seed=seed, buffer_documents=100))
        return {tuple(index.piece_document[a:b]) for a, b in itertools.pairwise(index.window_offsets)}

    assert windows(0) == windows(0)
    assert len(windows(0) & windows(1)) < 100  # measured 9 of 770
    first = min(windows(0), key=min)  # a window's documents come from all over the dataset
    assert max(max(window) - min(window) for window in windows(0)) > 1900 and max(first) > 200


@pytest.mark.parametrize(("seq_length", "alignment", "message"), [(10, 4, "multiple of the"), (10, 0, "positive")])
def test_impossible_rules_are_refused(seq_length, alignment, message):
    with pytest.raises(InputError, match=message):
        PackingRules(seq_length=seq_length, alignment=alignment)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([4, 0], "document 1 has no ids"), ([4, 2**31], r"document 1 has 2,147,483,648 ids, more than an int32 counts")],
)
def test_bad_lengths_are_refused(lengths, message):
    with pytest.raises(InputError, match=message):
        pack(np.array(lengths), Spans.join([[]] * len(lengths)), PackingRules(seq_length=10))


def test_spans_of_other_documents_are_refused():
    with pytest.raises(InputError, match="spans describe document 2, lengths 2 documents"):
        pack(np.array([4, 4]), Spans.join([[], [], [[0, 3]]]), PackingRules(seq_length=10))


def test_large_windows_reach_the_third_level_of_the_room_tree():
    """131,072 ids: rooms are found through three levels of 64-bit words."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 140_000, size=2000)
    spans = Spans.join([[] if number % 2 else [[0, 1]] for number in range(2000)])
    for shortest_cut in (0, 64):
        rules = PackingRules(seq_length=131_072, alignment=1, shortest_cut=shortest_cut)
        assert_equal_indexes(pack(lengths, spans, rules), pack_reference(lengths, spans, rules))

"""Packing: the C++ packer against its Python twin, and both against what packing must guarantee."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config import InputError
from megatron_ext.data.packing import Spans, pack, pack_reference


@st.composite
def corpora(draw):
    """Documents of alternating gaps and spans, a window and an alignment that divides it."""
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
    return np.array(lengths, dtype=np.int64), Spans.join(spans), seq_length, alignment


@given(corpora())
@settings(max_examples=400, deadline=None)
def test_cpp_equals_python(corpus):
    native, reference = pack(*corpus).arrays(), pack_reference(*corpus).arrays()
    for name in reference:
        np.testing.assert_array_equal(native[name], reference[name], err_msg=name)
        assert native[name].dtype == reference[name].dtype


@given(corpora())
@settings(max_examples=200, deadline=None)
def test_guarantees(corpus):
    lengths, spans, seq_length, alignment = corpus
    index = pack(*corpus)
    covered = [np.zeros(length, dtype=int) for length in lengths]
    cuts = {document: {0, int(length)} for document, length in enumerate(lengths)}
    for document, start, length in zip(index.piece_document, index.piece_start, index.piece_length, strict=True):
        assert length >= 1
        covered[document][start : start + length] += 1
        cuts[int(document)] |= {int(start), int(start + length)}
    for document, times in enumerate(covered):
        too_long = any(end - start > seq_length for start, end in spans.of(document))
        assert (document in index.skipped_documents) == too_long
        assert (times == (0 if too_long else 1)).all()
        if not too_long:
            assert not [c for c in cuts[document] for start, end in spans.of(document) if start < c < end]
            assert len(cuts[document]) == 2 or lengths[document] > seq_length
    used = []
    for w in range(len(index)):
        pieces = slice(index.window_offsets[w], index.window_offsets[w + 1])
        assert list(index.piece_document[pieces]) == sorted(index.piece_document[pieces])
        used.append(int((-(-index.piece_length[pieces] // alignment) * alignment).sum()))
        assert 0 < used[-1] <= seq_length
    # Best fit never opens a window while an open one has room: no two windows fit into one.
    assert sum(sorted(used)[:2]) > seq_length or len(used) < 2


def test_a_known_packing():
    """Window of 10: 7+3, 6+4, 5 alone; the 3 goes to the room of 3, not to a larger one."""
    lengths = np.array([3, 5, 7, 4, 6])
    index = pack(lengths, Spans.join([[]] * 5), 10)
    windows = [index.piece_document[a:b].tolist() for a, b in itertools.pairwise(index.window_offsets)]
    assert windows == [[0, 2], [3, 4], [1]]
    assert index.fill(10) == 25 / 30


def test_long_documents_are_cut_before_a_picture():
    """Text of 25 around a picture at 8..13, window 10: the second piece starts with the picture."""
    index = pack(np.array([25]), Spans.join([np.array([[8, 13]])]), 10)
    pieces = sorted(zip(index.piece_start.tolist(), index.piece_length.tolist(), strict=True))
    assert pieces == [(0, 8), (8, 10), (18, 7)]


def test_alignment_takes_room():
    index = pack(np.array([5, 5]), Spans.join([[], []]), 10, 1)
    assert len(index) == 1
    assert len(pack(np.array([5, 5]), Spans.join([[], []]), 10, 10)) == 2


@pytest.mark.parametrize(
    ("lengths", "seq_length", "alignment", "message"),
    [([4], 10, 4, "multiple of the alignment"), ([4], 10, 0, "positive"), ([4, 0], 10, 1, "document 1 has no ids")],
)
def test_bad_input_is_refused(lengths, seq_length, alignment, message):
    with pytest.raises(InputError, match=message):
        pack(np.array(lengths), Spans.join([[]] * len(lengths)), seq_length, alignment)


def test_spans_of_other_documents_are_refused():
    with pytest.raises(InputError, match="spans describe 1 documents, lengths 2"):
        pack(np.array([4, 4]), Spans.join([[]]), 10)


def test_large_windows_reach_the_third_level_of_the_room_tree():
    """131,072 ids: rooms are found through three levels of 64-bit words."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 140_000, size=2000)
    spans = Spans.join([[]] * len(lengths))
    native, reference = pack(lengths, spans, 131_072, 8), pack_reference(lengths, spans, 131_072, 8)
    for name, array in reference.arrays().items():
        np.testing.assert_array_equal(native.arrays()[name], array)

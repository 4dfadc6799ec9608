"""Judging many documents at once says what `Grammar.validate` says of each."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.vocab import Grammar, Image, Sweep, Text, Vocabulary, encode_document
from tests.unit.vocab.strategies import documents, mutations


def judge(vocabulary: Vocabulary, parts: list[np.ndarray]) -> list[tuple]:
    """What the sweep finds in the documents."""
    return Sweep(vocabulary).faults(np.concatenate(parts), np.array([len(part) for part in parts]))


def one_by_one(vocabulary: Vocabulary, parts: list[np.ndarray]) -> list[tuple]:
    """What `Grammar.validate` finds in each."""
    found = [(number, Grammar(vocabulary).validate(part)) for number, part in enumerate(parts)]
    return [(number, violation) for number, violation in found if violation is not None]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_valid_documents_pass(vocabulary: Vocabulary, data: st.DataObject) -> None:
    written = data.draw(st.lists(documents(vocabulary), min_size=1, max_size=6))
    assert judge(vocabulary, [encode_document(segments, vocabulary) for segments in written]) == []


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_is_found_as_by_the_grammar(vocabulary: Vocabulary, data: st.DataObject) -> None:
    written = data.draw(st.lists(documents(vocabulary), min_size=1, max_size=4))
    parts = [encode_document(segments, vocabulary).astype(np.int64) for segments in written]
    victim = data.draw(st.integers(0, len(parts) - 1))
    parts[victim] = data.draw(mutations(parts[victim], vocabulary))
    assert judge(vocabulary, parts) == one_by_one(vocabulary, parts)


def test_a_text_and_a_visual_id_that_change_places_are_found(vocabulary: Vocabulary) -> None:
    """All counts stay as they were."""
    text = Text(vocabulary.text.encode("a cat sits"))
    ids = encode_document([text, Image(np.zeros((3, 4), dtype=np.int64))], vocabulary)
    ids[[2, -5]] = ids[[-5, 2]]
    assert vocabulary.layout.is_visual(ids[2])
    whole = encode_document([text], vocabulary)
    ((number, violation),) = judge(vocabulary, [whole, ids, whole])
    assert (number, violation.position) == (1, 2)


def test_a_grid_larger_than_any_memory_is_only_wrong(vocabulary: Vocabulary) -> None:
    layout = vocabulary.layout
    meta = [vocabulary.meta_ids[character] for character in "999999999*999999999"]
    ids = np.array([layout.bos, layout.sov, *meta, layout.sot, layout.visual_start, layout.eos], dtype=np.int32)
    ((_, violation),) = judge(vocabulary, [ids])
    assert violation.position == len(ids) - 1


def test_counts(vocabulary: Vocabulary) -> None:
    text = vocabulary.text.encode("a cat")
    segments = [Text(text), Image(np.zeros((3, 4), dtype=np.int64))]
    if not vocabulary.block.frame_ends:  # BOS SOV SOT EOL EOL EOV EOS
        structure = 7
    else:  # and an EOL and EOF more
        structure = 9
    ids = encode_document(segments, vocabulary)
    assert Sweep(vocabulary).count(ids) == (len(text) + len("3*4"), 12, structure)

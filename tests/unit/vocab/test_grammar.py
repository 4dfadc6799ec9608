"""The automaton accepts exactly what document.py encodes, and can always finish in the room it is given."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config import InputError
from megatron_ext.vocab import (
    DocumentError,
    Grammar,
    Grid,
    Image,
    State,
    Text,
    Vocabulary,
    decode_document,
    encode_block_start,
    encode_document,
)
from tests.unit.vocab.strategies import documents, mutations


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_accepts_every_document(vocabulary: Vocabulary, data: st.DataObject) -> None:
    grammar = Grammar(vocabulary)
    ids = encode_document(data.draw(documents(vocabulary)), vocabulary)
    assert grammar.validate(ids) is None
    assert grammar.is_complete(grammar.advance_all(ids))


def _first_fault_by_stepping(grammar: Grammar, ids: np.ndarray) -> int | None:
    try:
        state = grammar.advance_all(ids)
    except DocumentError as error:
        return error.position
    return None if grammar.is_complete(state) else len(ids)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stepping_and_decoding_judge_alike(vocabulary: Vocabulary, data: st.DataObject) -> None:
    """On damaged documents: the same first fault, or another valid document."""
    grammar = Grammar(vocabulary)
    ids = encode_document(data.draw(documents(vocabulary)), vocabulary)
    damaged = data.draw(mutations(ids, vocabulary))
    violation = grammar.validate(damaged)
    assert (violation.position if violation else None) == _first_fault_by_stepping(grammar, damaged)
    if violation is None:
        assert np.array_equal(encode_document(decode_document(damaged, vocabulary), vocabulary), damaged)


def _walk(grammar: Grammar, room: int, rng: random.Random) -> list[int]:
    """Choose first among the ranges, then within one, so that blocks are as likely as text."""
    state, ids = grammar.start(), []
    while not grammar.is_complete(state):
        low, high = rng.choice(grammar.allowed(state, room - len(ids)))
        ids.append(rng.randrange(low, high))
        state = grammar.advance(state, ids[-1])
    return ids


@pytest.mark.parametrize("seed", range(40))
def test_random_walks_end_in_documents(vocabulary: Vocabulary, seed: int) -> None:
    rng = random.Random(seed)
    room = rng.choice([3, 4, 9, 30, 300])
    ids = _walk(Grammar(vocabulary), room, rng)
    assert len(ids) <= room
    assert np.array_equal(encode_document(decode_document(np.array(ids), vocabulary), vocabulary), ids)


def test_random_walks_reach_pictures_and_clips(custom: Vocabulary) -> None:
    rng, grammar = random.Random(0), Grammar(custom)
    kinds = {
        type(segment).__name__
        for _ in range(200)
        for segment in decode_document(np.array(_walk(grammar, 200, rng)), custom)
    }
    assert kinds == {"Text", "Image", "Video"}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_shortest_end_is_reached_and_never_beaten(vocabulary: Vocabulary, data: st.DataObject) -> None:
    grammar = Grammar(vocabulary)
    ids = encode_document(data.draw(documents(vocabulary)), vocabulary)
    cut = data.draw(st.integers(0, len(ids)))
    state = grammar.advance_all(ids[:cut])
    least = grammar.shortest_end(state)
    assert least <= len(ids) - cut
    for room in range(least, 0, -1):
        assert grammar.allowed(state, room - 1) == ()
        low, _ = grammar.allowed(state, room)[-1]
        state = grammar.advance(state, low)
    assert grammar.is_complete(state)


def test_allowed_along_a_picture(custom: Vocabulary) -> None:
    layout, grammar = custom.layout, Grammar(custom)
    one = [(token_id, token_id + 1) for token_id in range(layout.size)]
    visual = (layout.visual_start, layout.size)
    state = grammar.start()
    assert grammar.allowed(state) == (one[layout.bos],)
    state = grammar.advance(state, layout.bos)
    assert grammar.allowed(state) == ((1, layout.text_size), one[layout.sov])
    state = grammar.advance_all(encode_block_start(Grid(1, 1, 2), custom), state)
    for expected in [visual, visual, one[layout.eol], one[layout.eof], one[layout.eov]]:
        assert grammar.allowed(state) == (expected,)
        state = grammar.advance(state, expected[0])
    assert grammar.allowed(state) == ((1, layout.text_size), *sorted([one[layout.eos], one[layout.sov]]))
    state = grammar.advance(state, layout.eos)
    assert grammar.allowed(state) == () and grammar.is_complete(state)


def test_qwen_digits_are_one_range(emu3: Vocabulary) -> None:
    grammar = Grammar(emu3)
    state = grammar.advance_all([emu3.layout.bos, emu3.layout.sov])
    assert grammar.allowed(state) == ((16, 25),)
    assert grammar.allowed(grammar.advance(state, 16)) == ((9, 10), (15, 25))


def test_room_bounds_the_grid(emu3: Vocabulary) -> None:
    """With room for a 64*64 picture only, no larger digit than 4 may follow `64*6`; clips of 64 frames still fit."""
    grammar = Grammar(emu3)
    state = grammar.advance_all([emu3.layout.bos, emu3.layout.sov, *emu3.text.encode("64*6")])
    assert grammar.allowed(state, 1 + 1 + 4162 + 1) == ((9, 10), (15, 20), (emu3.layout.sot, emu3.layout.sot + 1))


def test_states_are_hashable_and_small(custom: Vocabulary) -> None:
    grammar = Grammar(custom)
    ids = encode_document([Image(np.zeros((40, 40), dtype=int)), Text([5])], custom)
    states = {grammar.advance_all(ids[:cut]) for cut in (1, 5, 100, 1000, len(ids))}
    assert len(states) == 5 and all(type(state) is State for state in states)


def test_errors(custom: Vocabulary) -> None:
    layout, grammar = custom.layout, Grammar(custom)
    with pytest.raises(InputError, match=r"expected BOS <.extra_203.>, found text id 5"):
        grammar.advance(grammar.start(), 5)
    with pytest.raises(DocumentError, match="position 1: expected .*, found EOS"):
        grammar.advance_all([layout.bos, layout.eos])
    with pytest.raises(DocumentError, match="nothing after EOS"):
        grammar.advance_all([layout.bos, 5, layout.eos, 5])
    violation = grammar.validate(np.array([layout.bos, 5]))
    assert violation == (2, "the ids end before EOS")

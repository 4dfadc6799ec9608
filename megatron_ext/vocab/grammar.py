"""What may come next in a document: an automaton over ids whose every rule is asked of document.py.

Generation uses it as a mask, the data validator to name the first wrong id.
"""

from collections.abc import Iterable
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.vocab.document import (
    ANY_VISUAL,
    META_END,
    SEPARATOR,
    DocumentError,
    Grid,
    decode_document,
    meta_continuations,
)
from megatron_ext.vocab.vocabulary import Vocabulary

Ranges = tuple[tuple[int, int], ...]
"""Disjoint `[low, high)` ranges of ids, ascending."""

# A block's expected ids are computed this many at a time, so that a step costs a list lookup whatever the grid.
_PAGE = 1024


class Phase(Enum):
    """Where in a document the next id stands."""

    START = "start"
    """Before BOS."""
    FIRST = "first"
    """After BOS: a segment must begin."""
    OPEN = "open"
    """In a text or after a segment: the text goes on, a block begins, or the document ends."""
    META = "meta"
    """After SOV, in the meta."""
    BODY = "body"
    """After SOT, in the visual ids."""
    END = "end"
    """After EOS."""


class State(NamedTuple):
    """All that decides what may follow; small, immutable and hashable."""

    phase: Phase
    meta: str = ""
    """The current block's meta as far as it goes; phases META and BODY only."""
    offset: int = 0
    """Ids since SOT; phase BODY only."""


class Violation(NamedTuple):
    """The first id at fault (the array's length when ids are missing), and why."""

    position: int
    reason: str


class Grammar:
    """The next-token automaton of a vocabulary's documents.

    `advance_all` accepts exactly the beginnings of documents; a sequence is a document when the state it ends in is
    `is_complete`.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        # Samples of one batch stand in the same few states, and so do the passes of guidance.
        self._choices = lru_cache(maxsize=1024)(self._compute_choices)
        self._page = lru_cache(maxsize=256)(self._compute_page)

    def start(self) -> State:
        """Before the first id."""
        return State(Phase.START)

    def is_complete(self, state: State) -> bool:
        """Whether a whole document lies behind `state`."""
        return state.phase is Phase.END

    def allowed(self, state: State, room: int | None = None) -> Ranges:
        """Ids that may follow.

        Args:
            state: where the document stands.
            room: how many more ids there may be, this one included; only ids after which the document can still be
                completed in that room are allowed. Following it from a state with `shortest_end(state) <= room`
                always ends in a complete document. None: no limit.
        """
        return _merge(
            span
            for ranges, following in self._choices(state)
            if room is None or self.shortest_end(following) < room
            for span in ranges
        )

    def advance(self, state: State, token_id: int) -> State:
        """The state after `token_id`.

        Raises:
            InputError: the id may not follow; the message says what may.
        """
        following = self._follow(state, token_id)
        if following is None:
            raise InputError(self._reason(state, token_id))
        return following

    def advance_all(self, ids: Iterable[int], state: State | None = None) -> State:
        """The state after all `ids`, from `state` or the start.

        Raises:
            DocumentError: an id may not follow; it names the position in `ids`.
        """
        state = self.start() if state is None else state
        for position, token_id in enumerate(ids):
            following = self._follow(state, int(token_id))
            if following is None:
                raise DocumentError(position, self._reason(state, int(token_id)))
            state = following
        return state

    def shortest_end(self, state: State) -> int:
        """The least number of ids that completes the document."""
        vocabulary = self._vocabulary
        if state.phase is Phase.BODY:
            return Grid.parse(state.meta).body_length(vocabulary.block) - state.offset + 1
        if state.phase is Phase.META:
            meta = state.meta
            # Fewest and smallest numbers: each one more, or longer, only adds ids.
            while META_END not in (following := meta_continuations(meta, vocabulary.block)):
                meta += SEPARATOR if SEPARATOR in following else "1"
            return len(meta) - len(state.meta) + 1 + Grid.parse(meta).body_length(vocabulary.block) + 1
        return {Phase.START: 3, Phase.FIRST: 2, Phase.OPEN: 1, Phase.END: 0}[state.phase]

    def validate(self, ids_N: np.ndarray) -> Violation | None:
        """None when the ids are a document, else the first position at fault and the reason.

        Decodes, which is the same judgement as stepping and far faster on long blocks.
        """
        try:
            decode_document(ids_N, self._vocabulary)
        except DocumentError as error:
            return Violation(error.position, error.reason)
        return None

    def _follow(self, state: State, token_id: int) -> State | None:
        for ranges, following in self._choices(state):
            if any(low <= token_id < high for low, high in ranges):
                return following
        return None

    def _compute_choices(self, state: State) -> tuple[tuple[Ranges, State], ...]:
        """Every (ids, the state they lead to)."""
        layout = self._vocabulary.layout
        match state.phase:
            case Phase.START:
                return ((_one(layout.bos), State(Phase.FIRST)),)
            case Phase.FIRST | Phase.OPEN:
                choices = (
                    (self._vocabulary.text_ranges, State(Phase.OPEN)),
                    (_one(layout.sov), State(Phase.META)),
                )
                return choices if state.phase is Phase.FIRST else (*choices, (_one(layout.eos), State(Phase.END)))
            case Phase.META:
                return tuple(self._after_meta(state.meta))
            case Phase.BODY:
                return (self._in_body(state),)
            case Phase.END:
                return ()

    def _after_meta(self, meta: str) -> Iterable[tuple[Ranges, State]]:
        for character in meta_continuations(meta, self._vocabulary.block):
            if character == META_END:
                yield _one(self._vocabulary.layout.sot), State(Phase.BODY, meta)
            else:
                yield _one(self._vocabulary.meta_ids[character]), State(Phase.META, meta + character)

    def _in_body(self, state: State) -> tuple[Ranges, State]:
        layout = self._vocabulary.layout
        page, index = divmod(state.offset, _PAGE)
        expected = self._page(state.meta, page)[index]
        if expected == ANY_VISUAL:
            return ((layout.visual_start, layout.size),), state._replace(offset=state.offset + 1)
        following = State(Phase.OPEN) if expected == layout.eov else state._replace(offset=state.offset + 1)
        return _one(expected), following

    def _compute_page(self, meta: str, page: int) -> list[int]:
        """What the block's grid demands at offsets `page * _PAGE` and on."""
        grid = Grid.parse(meta)
        stop = min((page + 1) * _PAGE, grid.body_length(self._vocabulary.block))
        return grid.expected_ids(np.arange(page * _PAGE, stop), self._vocabulary).tolist()

    def _reason(self, state: State, token_id: int) -> str:
        describe = self._vocabulary.describe
        wanted = ", ".join(
            describe(low) if high == low + 1 else f"{describe(low)}..{describe(high - 1)}"
            for low, high in self.allowed(state)
        )
        return f"expected {wanted or 'nothing after EOS'}, found {describe(token_id)}"


def _one(token_id: int) -> Ranges:
    return ((token_id, token_id + 1),)


def _merge(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Sorted, touching ranges joined: the digits of most tokenizers are one range."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and merged[-1][1] == low:
            merged[-1] = (merged[-1][0], high)
        else:
            merged.append((low, high))
    return tuple(merged)

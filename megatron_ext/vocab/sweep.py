"""The grammar over many documents at once: `Grammar.validate` at the speed of memory.

Documents that follow one another in one array are judged together. Ids of structure are few and lie apart, so their
positions are found first; all that is then compared is the positions and ids that each block's grid demands
(`Grid.expected_ids`, the one definition), and whether what lies between them is text or visual where it must be. Only
an array in which something is wrong is read again document by document, by `Grammar.validate`, which names it.

Shape suffixes: N ids; D documents; M marks, the ids that are neither text nor visual; B blocks; K marks of a body.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megatron_ext.vocab.document import ANY_VISUAL, MAX_DIGITS, META_END, Grid, meta_continuations
from megatron_ext.vocab.grammar import Grammar, Violation
from megatron_ext.vocab.vocabulary import Vocabulary

_LONGEST_META = 5 * (MAX_DIGITS + 1)
_FEW_HOLES = 4
"""Ids without text that are sought one by one; more are looked up in a table, which is slower."""


class IdCounts(NamedTuple):
    """How many ids are of which kind. The digits of a meta are text ids."""

    text: int
    visual: int
    structure: int


class _Marks(NamedTuple):
    """What a block's body must hold between its visual ids."""

    offsets_K: np.ndarray
    """Positions, from the first id after SOT."""
    ids_K: np.ndarray
    length: int
    """Ids of the body."""
    visual: int
    """Visual ids of the body."""


class Sweep:
    """Judges and counts arrays of whole documents."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._grammar = Grammar(vocabulary)
        self._grid_of = lru_cache(maxsize=4096)(self._compute_grid)
        self._marks_of = lru_cache(maxsize=1024)(self._compute_marks)
        self._characters = {token_id: character for character, token_id in vocabulary.meta_ids.items()}
        text_ids = np.arange(vocabulary.layout.text_size, dtype=np.int32)
        self._holes = text_ids[~vocabulary.is_text(text_ids)]

    def count(self, ids_N: np.ndarray) -> IdCounts:
        """How many of the ids, which may be of documents or not, are text, visual and of structure."""
        layout = self._vocabulary.layout
        text = int(np.count_nonzero(ids_N < layout.text_size))
        visual = int(np.count_nonzero(ids_N >= layout.visual_start))
        return IdCounts(text, visual, len(ids_N) - text - visual)

    def faults(self, ids_N: np.ndarray, length_D: np.ndarray) -> list[tuple[int, Violation]]:
        """(index in `length_D`, first fault) of every document that is none; `ids_N` are all documents' in order."""
        ends_D = np.cumsum(length_D, dtype=np.int64)
        if self._are_documents(ids_N, ends_D - length_D, ends_D):
            return []
        parts = np.split(ids_N, ends_D[:-1])
        judged = ((number, self._grammar.validate(part)) for number, part in enumerate(parts))
        return [(number, violation) for number, violation in judged if violation is not None]

    def _are_documents(self, ids_N: np.ndarray, start_D: np.ndarray, end_D: np.ndarray) -> bool:
        """Whether all are. BOS and EOS are marks, so no block that passes here reaches into another document."""
        layout = self._vocabulary.layout
        if (end_D - start_D).min() < 3 or ids_N.min() < 0 or ids_N.max() >= layout.size or self._has_hole(ids_N):
            return False
        if (ids_N[start_D] != layout.bos).any() or (ids_N[end_D - 1] != layout.eos).any():
            return False
        visual_N = ids_N >= layout.visual_start
        text_N = ids_N < layout.text_size
        position_M = np.flatnonzero(~(visual_N | text_N))
        mark_M = ids_N[position_M]
        first_B = np.flatnonzero(mark_M == layout.sov)
        num_marks, num_visual = 2 * len(start_D), 0
        if len(first_B):
            blocks = self._blocks(ids_N, position_M, mark_M, first_B)
            if blocks is None:
                return False
            begin_B, end_B, marks, visual = blocks
            text_positions = np.flatnonzero(text_N)
            if (np.searchsorted(text_positions, begin_B) != np.searchsorted(text_positions, end_B)).any():
                return False
            num_marks, num_visual = num_marks + marks, visual
        return num_marks == len(mark_M) and num_visual == np.count_nonzero(visual_N)

    def _blocks(
        self, ids_N: np.ndarray, position_M: np.ndarray, mark_M: np.ndarray, first_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, int, int] | None:
        """Where bodies begin and end, and the marks and visual ids of all blocks; None where one has wrong marks.

        `first_B` are the indices of the blocks' SOV among the marks.
        """
        if first_B[-1] + 1 >= len(mark_M) or (mark_M[first_B + 1] != self._vocabulary.layout.sot).any():
            return None
        begin_B = position_M[first_B + 1] + 1
        length_B = begin_B - 2 - position_M[first_B]
        end_B = np.empty_like(begin_B)
        marks = visual = 0
        for meta, blocks in self._by_meta(ids_N, position_M[first_B] + 1, length_B):
            grid = self._grid_of(meta)
            if grid is None or grid.body_length(self._vocabulary.block) > len(ids_N):
                return None
            wanted = self._marks_of(grid)
            own_BK = first_B[blocks, None] + 2 + np.arange(len(wanted.ids_K))
            if own_BK[-1, -1] >= len(mark_M):
                return None
            offset_BK = position_M[own_BK] - begin_B[blocks, None]
            if (offset_BK != wanted.offsets_K).any() or (mark_M[own_BK] != wanted.ids_K).any():
                return None
            end_B[blocks] = begin_B[blocks] + wanted.length
            marks += len(blocks) * (2 + len(wanted.ids_K))
            visual += len(blocks) * wanted.visual
        return begin_B, end_B, marks, visual

    def _by_meta(
        self, ids_N: np.ndarray, begin_B: np.ndarray, length_B: np.ndarray
    ) -> Sequence[tuple[tuple[int, ...], np.ndarray]]:
        """(ids of a meta, blocks that have it, ascending) for every meta of the blocks."""
        longest = min(int(length_B.max()), _LONGEST_META + 1)  # a longer one is wrong whatever follows
        column = np.arange(longest)
        at_BK = np.minimum(begin_B[:, None] + column, len(ids_N) - 1)
        meta_BK = np.where(column < length_B[:, None], ids_N[at_BK], -1)
        if not longest:
            return [((), np.arange(len(begin_B)))]
        blocks_of: dict[bytes, list[int]] = {}
        for block, meta in enumerate(
            np.ascontiguousarray(meta_BK).view(f"V{meta_BK.itemsize * longest}").ravel().tolist()
        ):
            blocks_of.setdefault(meta, []).append(block)
        found = ((np.frombuffer(meta, meta_BK.dtype), np.array(blocks)) for meta, blocks in blocks_of.items())
        return [(tuple(meta[meta >= 0].tolist()), blocks) for meta, blocks in found]

    def _compute_grid(self, meta_ids: tuple[int, ...]) -> Grid | None:
        """What a meta says; None where it is none."""
        vocabulary = self._vocabulary
        meta = ""
        for token_id in meta_ids:
            character = self._characters.get(token_id, META_END)
            if character == META_END or character not in meta_continuations(meta, vocabulary.block):
                return None
            meta += character
        return Grid.parse(meta) if META_END in meta_continuations(meta, vocabulary.block) else None

    def _compute_marks(self, grid: Grid) -> _Marks:
        expected = grid.expected_ids(np.arange(grid.body_length(self._vocabulary.block)), self._vocabulary)
        offsets_K = np.flatnonzero(expected != ANY_VISUAL)
        return _Marks(offsets_K, expected[offsets_K], len(expected), len(expected) - len(offsets_K))

    def _has_hole(self, ids_N: np.ndarray) -> bool:
        """Whether an id is in the range of text and stands for none, such as SentencePiece's control ids."""
        if len(self._holes) <= _FEW_HOLES:
            return any((ids_N == hole).any() for hole in self._holes)
        return bool(np.isin(ids_N, self._holes).any())

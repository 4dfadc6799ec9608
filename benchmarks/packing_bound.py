"""How many windows documents need at least, whoever packs them: lower bounds of bin packing, computed exactly.

Items are pieces with their alignment padding. Each bound holds for every packing of such items, and the largest of them
is returned:

- volume: all ids, divided by a window;
- Martello & Toth 1990, "Lower bounds and reduction procedures for the bin packing problem", L2: items above half a
  window never share one, so what they leave is all that the items from a threshold up to half a window can get of
  their windows;
- dual feasible functions u^(k) (Fekete & Schepers 2001, "New classes of fast lower bounds for bin packing problems"):
  weights by size such that no window holds more than 1.

Where documents may be cut at will, outside their unbreakable spans, the spans are items and the other ids are dust that
goes anywhere.
"""

import numpy as np

from megatron_ext.data.packing import PackedIndex, PackingRules, Spans

MOST_ITEMS = 100
"""Largest k of the dual feasible functions: items of a window that they tell apart."""


def bound_of_pieces(index: PackedIndex, rules: PackingRules) -> float:
    """No packing of the same pieces has a larger share of its positions filled with ids."""
    lengths = index.piece_length.astype(np.int64)
    counts = np.bincount(_padded(lengths, rules), minlength=rules.seq_length + 1)
    return int(lengths.sum()) / (fewest_windows(counts, 0, rules.seq_length) * rules.seq_length)


def bound_of_documents(lengths: np.ndarray, spans: Spans, rules: PackingRules) -> float:
    """No packing of the documents has a larger share, even one that cuts at will what `rules` let it cut: the documents
    longer than a window, and with `rules.shortest_cut` all texts."""
    is_unpackable = np.zeros(len(lengths), dtype=bool)
    is_unpackable[_unpackable(spans, rules)] = True
    is_whole = lengths <= rules.seq_length
    if rules.shortest_cut:
        has_spans = np.zeros(len(lengths), dtype=bool)
        has_spans[spans.documents] = True
        is_whole &= has_spans
    is_cut = ~is_whole & ~is_unpackable
    owners = np.repeat(spans.documents, np.diff(spans.offsets))
    sizes = (spans.bounds[:, 1] - spans.bounds[:, 0])[is_cut[owners]]
    items = np.concatenate([_padded(lengths[is_whole].astype(np.int64), rules), sizes])
    dust = int(lengths[is_cut].sum(dtype=np.int64) - sizes.sum(dtype=np.int64))
    windows = fewest_windows(np.bincount(items, minlength=rules.seq_length + 1), dust, rules.seq_length)
    return int(lengths[~is_unpackable].sum(dtype=np.int64)) / (windows * rules.seq_length)


def fewest_windows(counts: np.ndarray, dust: int, seq_length: int) -> int:
    """The bound for counts[size] items of each size up to `seq_length`, and `dust` ids beside them."""
    sizes = np.arange(seq_length + 1, dtype=np.int64)
    volume = _ceil_div(int((counts * sizes).sum()) + dust, seq_length)
    return max(volume, _martello_toth(counts, dust, seq_length), *_dual_feasible(counts, seq_length))


def _padded(lengths: np.ndarray, rules: PackingRules) -> np.ndarray:
    return -(-lengths // rules.alignment) * rules.alignment


def _unpackable(spans: Spans, rules: PackingRules) -> np.ndarray:
    too_long = spans.bounds[:, 1] - spans.bounds[:, 0] > rules.seq_length
    return np.unique(np.repeat(spans.documents, np.diff(spans.offsets))[too_long])


def _martello_toth(counts: np.ndarray, dust: int, seq_length: int) -> int:
    number, volume = np.cumsum(counts), np.cumsum(counts * np.arange(seq_length + 1, dtype=np.int64))
    half = seq_length // 2
    above_half = number[-1] - number[half]
    threshold = np.arange(half + 1)
    large = number[-1] - number[seq_length - threshold]  # too large to share a window with an item of the threshold
    room = (above_half - large) * seq_length - (volume[seq_length - threshold] - volume[half])
    below = np.where(threshold > 0, volume[threshold - 1], 0)
    small = volume[half] - below + np.where(threshold == 0, dust, 0)
    more = np.maximum(0, -(-(small - room) // seq_length))
    return int((above_half + more).max())


def _dual_feasible(counts: np.ndarray, seq_length: int) -> list[int]:
    sizes = np.flatnonzero(counts).astype(np.int64)
    number = counts[sizes]
    bounds = []
    for k in range(1, MOST_ITEMS + 1):
        multiple, rest = np.divmod((k + 1) * sizes, seq_length)
        # Sizes of exactly a (k + 1)th of a window, or several, keep their share of it; others get floor(...) / k.
        kept = int((number * sizes)[rest == 0].sum())
        floored = int((number * multiple)[rest != 0].sum())
        bounds.append(_ceil_div(floored * seq_length + kept * k, k * seq_length))
    return bounds


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)

"""Which of many pictures show the same: exactly, and nearly by their perceptual hashes.

The rule does not depend on the order of the pictures: they are ranked, the best first, and one is dropped when it
equals or nearly equals a better one that is kept. So of every two that are kept, none is near the other, and each that
is dropped is near one that is kept.

All pairs of hashes within a distance are found without comparing all pairs (media/hash_blocks.py).

Shapes: N pictures, U distinct hashes, P pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_ext.media.hash_blocks import Speed, block_masks

MAX_DISTANCE = 8
"""Beyond it, hashes of different pictures come as near (measured: 20 bits on 32 photographs, and chance decides among
millions), and the sorts become many."""

_SPEED = Speed(compared=1e8, sorted=1e7)  # of numpy, measured on one core


@dataclass(frozen=True, kw_only=True)
class Fingerprints:
    """What duplicates are told by, of N pictures in the order of their rank: the best first."""

    bytes_N: np.ndarray
    """Digests of the encoded files, any type that numpy can sort."""

    pixels_N: np.ndarray
    """Digests of the decoded pixels."""

    hash_N: np.ndarray
    """Uint64 perceptual hashes."""

    has_hash_N: np.ndarray
    """Bool: False where a picture has no structure to be hashed."""


EXACT, SAME_PIXELS, NEAR = "duplicate_file", "duplicate_pixels", "duplicate_near"
"""Reasons."""


@dataclass(frozen=True, kw_only=True)
class Duplicate:
    """A picture to be dropped."""

    reason: str
    kept: int
    """Rank of the picture that is kept instead."""

    distance: int
    """Bits in which the hashes differ; 0 of exact ones."""


def find_duplicates(fingerprints: Fingerprints, max_distance: int | None) -> dict[int, Duplicate]:
    """Rank -> why it is dropped. With `max_distance` None only exact duplicates are."""
    found: dict[int, Duplicate] = {}
    for reason, digests_N in ((EXACT, fingerprints.bytes_N), (SAME_PIXELS, fingerprints.pixels_N)):
        ranks_N = _not_in(found, len(digests_N))
        first_N = _first_equal(digests_N[ranks_N])
        for place in np.flatnonzero(first_N != np.arange(len(ranks_N))):
            found[int(ranks_N[place])] = Duplicate(reason=reason, kept=int(ranks_N[first_N[place]]), distance=0)
    if max_distance is not None:
        found |= _near_duplicates(fingerprints, found, max_distance)
    return {rank: _followed(duplicate, found) for rank, duplicate in found.items()}


def pairs_within(hashes_U: np.ndarray, max_distance: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lower index, higher index, distance) of all pairs of distinct uint64 hashes that differ in at most
    `max_distance` bits, each pair once, in order."""
    count = len(hashes_U)
    low_P, high_P, distance_P = (np.empty(0, dtype) for dtype in (np.int64, np.int64, np.uint8))
    for mask in map(np.uint64, block_masks(max_distance, count, _SPEED)):
        order_U = np.argsort(hashes_U & mask, kind="stable")
        for first_P, second_P in _standing_together(hashes_U[order_U] & mask):
            one_P, other_P = order_U[first_P], order_U[second_P]
            bits_P = np.bitwise_count(hashes_U[one_P] ^ hashes_U[other_P])
            near_P = bits_P <= max_distance
            low_P = np.concatenate([low_P, np.minimum(one_P, other_P)[near_P]])
            high_P = np.concatenate([high_P, np.maximum(one_P, other_P)[near_P]])
            distance_P = np.concatenate([distance_P, bits_P[near_P]])
    _, once_P = np.unique(low_P * count + high_P, return_index=True)  # several choices find the same pair
    return low_P[once_P], high_P[once_P], distance_P[once_P]


def _near_duplicates(
    fingerprints: Fingerprints, exact: dict[int, Duplicate], max_distance: int
) -> dict[int, Duplicate]:
    ranks_N = _not_in(exact, len(fingerprints.has_hash_N))
    ranks_N = ranks_N[fingerprints.has_hash_N[ranks_N]]
    # The best picture of each hash speaks for the others of it, which have the same neighbours.
    hashes_U, first_U, which_N = np.unique(fingerprints.hash_N[ranks_N], return_index=True, return_inverse=True)
    found = {
        int(ranks_N[place]): Duplicate(reason=NEAR, kept=int(ranks_N[first_U[which_N[place]]]), distance=0)
        for place in np.flatnonzero(first_U[which_N] != np.arange(len(ranks_N)))
    }
    by_rank_U = np.argsort(first_U)
    low_P, high_P, distance_P = pairs_within(hashes_U[by_rank_U], max_distance)
    rank_of_U = ranks_N[first_U[by_rank_U]]
    dropped: set[int] = set()
    # By the worse picture: every better one is decided before it is asked.
    for place in np.lexsort((low_P, distance_P, high_P)):
        better, worse = int(low_P[place]), int(high_P[place])
        if worse not in dropped and better not in dropped:
            dropped.add(worse)
            found[int(rank_of_U[worse])] = Duplicate(
                reason=NEAR, kept=int(rank_of_U[better]), distance=int(distance_P[place])
            )
    return found


def _followed(duplicate: Duplicate, found: dict[int, Duplicate]) -> Duplicate:
    """The same with the picture that is kept in the end: the one that equals it may be dropped for a better one."""
    kept, distance = duplicate.kept, duplicate.distance
    while kept in found:
        distance = max(distance, found[kept].distance)
        kept = found[kept].kept
    return Duplicate(reason=duplicate.reason, kept=kept, distance=distance)


def _not_in(found: dict[int, Duplicate], count: int) -> np.ndarray:
    """Ranks below `count` that are not yet dropped."""
    is_left_N = np.ones(count, dtype=bool)
    is_left_N[list(found)] = False
    return np.flatnonzero(is_left_N)


def _first_equal(values_N: np.ndarray) -> np.ndarray:
    """[N] for each value the place of the first that equals it."""
    _, first_U, which_N = np.unique(values_N, return_index=True, return_inverse=True)
    return first_U[which_N]


def _standing_together(keys_U: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of places in sorted keys that hold the same key: first all neighbours, then all at two steps, and so on."""
    places_P = np.arange(len(keys_U) - 1)
    step = 1
    while len(places_P):
        places_P = places_P[places_P + step < len(keys_U)]
        places_P = places_P[keys_U[places_P] == keys_U[places_P + step]]
        yield places_P, places_P + step
        step += 1

"""Shapes that batches may have, and which picture goes into which.

A bucket's area is that of the square of its size, as far as sides that are multiples of the spatial factor allow; its
aspect ratio is one of those configured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RAREST_SHARE = 1e-3
"""A bucket with a smaller share of the samples is given up: a batch of it would be too rare an event."""


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape of a batch's frames."""

    size: int
    """Side of the square of about the same area."""

    height: int
    """Pixels."""

    width: int
    """Pixels."""


def make_buckets(sizes: Sequence[int], aspect_ratios: Sequence[float], factor: int) -> list[Bucket]:
    """All shapes, sorted; sides are multiples of `factor`, areas at most those of the squares.

    The height is the nearest multiple to that of the exact rectangle, the width the largest multiple that the area
    leaves room for.
    """
    buckets = set()
    for size in sizes:
        for ratio in aspect_ratios:
            height = max(1, round(size / math.sqrt(ratio) / factor)) * factor
            width = max(1, size * size // (height * factor)) * factor
            buckets.add(Bucket(size, height, width))
    return sorted(buckets)


def assign(buckets: Sequence[Bucket], height_N: np.ndarray, width_N: np.ndarray) -> np.ndarray:
    """For each of N samples the number of its bucket: of the largest size that need not enlarge it, else of the
    smallest size, the one nearest in aspect ratio."""
    ratio_N = np.log(width_N / height_N)
    chosen_N = np.full(len(height_N), -1)
    heights = np.array([bucket.height for bucket in buckets])
    widths = np.array([bucket.width for bucket in buckets])
    for size in sorted({bucket.size for bucket in buckets}):
        numbers = [number for number, bucket in enumerate(buckets) if bucket.size == size]
        ratios = np.log([buckets[number].width / buckets[number].height for number in numbers])
        nearest_N = np.array(numbers)[np.abs(ratio_N[:, None] - ratios).argmin(axis=1)]
        fills_N = (height_N >= heights[nearest_N]) & (width_N >= widths[nearest_N])
        chosen_N = np.where(fills_N | (chosen_N < 0), nearest_N, chosen_N)
    return chosen_N


def give_up_rare(buckets: Sequence[Bucket], chosen_N: np.ndarray, least: Sequence[int]) -> np.ndarray:
    """`chosen_N` without rare buckets: with fewer than `least[bucket]` samples (a batch would hold one twice), or a
    share under RAREST_SHARE. Their samples move to the bucket nearest in size, then in aspect ratio; to a larger one
    only where there is no other. The last bucket stays."""
    chosen_N = chosen_N.copy()
    counts = np.bincount(chosen_N, minlength=len(buckets))
    while True:
        used = np.flatnonzero(counts)
        rare = [b for b in used if counts[b] < max(least[b], RAREST_SHARE * len(chosen_N))]
        if not rare or len(used) == 1:
            return chosen_N
        moved = min(rare, key=lambda b: (counts[b], b))
        others = [b for b in used if b != moved]
        target = min(others, key=lambda b: (_distance(buckets[moved], buckets[b]), b))
        chosen_N[chosen_N == moved] = target
        counts[target] += counts[moved]
        counts[moved] = 0


def _distance(bucket: Bucket, other: Bucket) -> tuple[bool, float, float]:
    ratios = [math.log(item.width / item.height) for item in (bucket, other)]
    return other.size > bucket.size, abs(math.log(other.size / bucket.size)), abs(ratios[0] - ratios[1])

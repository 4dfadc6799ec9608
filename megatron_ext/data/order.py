"""The order of a run: which window of which dataset is sample i. A function of (seed, i), computed in O(1).

No shuffle array exists: a window's place comes from a keyed permutation, evaluated at one point. So any rank of any
layout finds any sample of the run without state, and a resumed run needs the number of consumed samples only.
All randomness is BLAKE2b/SHAKE-256 of (seed, purpose, numbers): the same on every machine and library version.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.config.data import LONGEST_PERIOD

_ROUNDS = 8


def derive_key(*parts: int | str) -> bytes:
    """A 32-byte key from what names a random choice, such as (seed, "epoch", dataset, 3)."""
    return hashlib.sha256("\0".join(f"{type(part).__name__}:{part}" for part in parts).encode()).digest()


class Permutation:
    """A keyed bijection of [0, size), evaluated at one point: `permutation[i]`.

    A Feistel network on pairs (left, right) in Z_a x Z_b with a * b barely above `size` (Black & Rogaway 2002,
    "Ciphers with arbitrary finite domains"): every round adds a hash of one half to the other, which is invertible.
    A value outside [0, size) is encrypted again until it falls inside ("cycle walking"); fewer than a of the a * b
    values are outside, so a walk is rare.
    """

    def __init__(self, key: bytes, size: int):
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, got size {size}")
        self.size = size
        self._key = key
        self._left_size = math.isqrt(size - 1) + 1
        self._right_size = -(-size // self._left_size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside [0, {self.size})")
        value = self._encrypt(index)
        while value >= self.size:
            value = self._encrypt(value)
        return value

    def _encrypt(self, value: int) -> int:
        left, right = divmod(value, self._right_size)
        for number in range(0, _ROUNDS, 2):
            left = (left + self._hash(number, right)) % self._left_size
            right = (right + self._hash(number + 1, left)) % self._right_size
        return left * self._right_size + right

    def _hash(self, round_number: int, half: int) -> int:
        message = round_number.to_bytes(1, "little") + half.to_bytes(8, "little")
        return int.from_bytes(hashlib.blake2b(message, key=self._key, digest_size=8).digest(), "little")


def apportion(weights: Sequence[float], names: Sequence[str] | None = None) -> tuple[int, ...]:
    """Integer slots per period whose shares are the weights': exact where a period of at most LONGEST_PERIOD slots can
    hold them, else LONGEST_PERIOD slots shared by largest remainder.

    Raises:
        InputError: a weight that is not a positive number, or too small a share to get one slot.
    """
    names = names or [f"dataset {index}" for index in range(len(weights))]
    for name, weight in zip(names, weights, strict=True):
        if not (weight > 0 and math.isfinite(weight)):
            raise InputError(f"data weight of {name} is {weight}: give a number above 0, or leave the dataset out")
    exact = [Fraction(str(weight)) for weight in weights]  # str: 0.1 means one tenth, not its nearest double
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period > LONGEST_PERIOD:
        period = LONGEST_PERIOD
    slots = [math.floor(share * period) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda d: (slots[d] - shares[d] * period, d))
    for dataset in by_remainder[: period - sum(slots)]:
        slots[dataset] += 1
    for name, weight, count in zip(names, weights, slots, strict=True):
        if count == 0:
            raise InputError(
                f"data weight of {name} is {weight}, less than 1/{LONGEST_PERIOD} of all: raise it or leave it out"
            )
    return tuple(slots)


@dataclass(frozen=True, kw_only=True)
class BlendStart:
    """Where in a run a blend of D datasets begins: at its first sample, or at a restart that changed the blend."""

    sample: int
    """The blend's first."""
    numbers: tuple[int, ...]
    """D numbers that key the datasets' permutations."""
    consumed: tuple[int, ...]
    """Windows of each of the D that the run had consumed before."""


class Blend:
    """Sample i of a run: `blend[i] -> (dataset, window)`.

    Time is cut into periods in which dataset d has exactly `slots[d]` samples, at places drawn per period. The k-th
    sample of a dataset is the k-th value of its epochs' permutations, one after the other: every window of a dataset
    is seen once before any is seen twice.

    Args:
        weights: share of the windows of each dataset, relative to each other.
        sizes: windows of each dataset.
        seed: of the run.
        names: of the datasets, for messages.
        start: where the blend begins; None: with the run.
    """

    def __init__(
        self,
        weights: Sequence[float],
        sizes: Sequence[int],
        seed: int,
        names: Sequence[str] | None = None,
        start: BlendStart | None = None,
    ):
        self.start = start or BlendStart(sample=0, numbers=tuple(range(len(sizes))), consumed=(0,) * len(sizes))
        self.slots = apportion(weights, names)
        self.sizes = tuple(int(size) for size in sizes)
        self.seed = seed
        self.period = sum(self.slots)
        # A run walks through periods in order: the cache spares recomputing the one it is in.
        self._places = lru_cache(maxsize=2)(self._draw_places)

    def __getitem__(self, index: int) -> tuple[int, int]:
        dataset, _, window = self.locate(index)
        return dataset, window

    def locate(self, index: int) -> tuple[int, int, int]:
        """(dataset, how many times that dataset was seen whole before, window) of sample `index`."""
        if index < self.start.sample:
            raise IndexError(f"sample {index} is before the blend's first, {self.start.sample}")
        period, place = divmod(index - self.start.sample, self.period)
        datasets, ranks = self._places(period)
        dataset = int(datasets[place])
        consumed = self.start.consumed[dataset] + period * self.slots[dataset] + int(ranks[place])
        epoch, position = divmod(consumed, self.sizes[dataset])
        key = derive_key(self.seed, "epoch", self.start.numbers[dataset], epoch)
        return dataset, epoch, Permutation(key, self.sizes[dataset])[position]

    def epoch(self, dataset: int, samples: int) -> float:
        """How often `dataset` has been seen after `samples` samples of the run, as a fraction of its windows."""
        return self.consumed(dataset, samples) / self.sizes[dataset]

    def consumed(self, dataset: int, samples: int) -> int:
        """Windows of `dataset` among the first `samples` samples of the run."""
        period, place = divmod(samples - self.start.sample, self.period)
        here = period * self.slots[dataset] + int((self._places(period)[0][:place] == dataset).sum())
        return self.start.consumed[dataset] + here

    def _draw_places(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place in a period: its dataset, and how many places of that dataset come before it."""
        if len(self.slots) == 1:
            return np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
        in_order = np.repeat(np.arange(len(self.slots)), self.slots)
        draw = hashlib.shake_256(derive_key(self.seed, "period", period)).digest(8 * self.period)
        datasets = in_order[np.argsort(np.frombuffer(draw, dtype="<u8"), kind="stable")]
        ranks = np.empty(self.period, dtype=np.int64)
        # A stable sort by dataset lists the places of each dataset in time order: their ranks are 0, 1, 2, ...
        ranks[np.argsort(datasets, kind="stable")] = np.concatenate([np.arange(count) for count in self.slots])
        return datasets, ranks

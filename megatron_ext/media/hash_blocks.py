"""Near pairs of 64-bit hashes without comparing all pairs: which of their bits to sort by.

Manku, Jain and Das Sarma ("Detecting Near-Duplicates for Web Crawling", WWW 2007, section 3): the 64 bits are cut into
B blocks; two hashes that differ in D bits agree in at least B - D blocks, so they stand together when sorted by some
choice of B - D blocks. One choice after the other is sorted, and only hashes that agree in it are compared.
"""

import itertools
import math
from typing import NamedTuple

HASH_BITS = 64


class Speed(NamedTuple):
    """What one core does in a second, to weigh the two costs of a choice."""

    compared: float
    """Pairs of hashes."""
    sorted: float
    """Hashes."""


def block_masks(max_distance: int, count: int, speed: Speed) -> list[int]:
    """The choices of blocks, as the bits to be compared; so many blocks as cost least for `count` hashes."""

    def cost(blocks: int) -> float:
        choices = math.comb(blocks, max_distance)
        equal_bits = HASH_BITS * (blocks - max_distance) // blocks
        return choices * (count / speed.sorted + count**2 / 2**equal_bits / 2 / speed.compared)

    blocks = min(range(max_distance + 1, max_distance + 9), key=cost)
    edges = [HASH_BITS * place // blocks for place in range(blocks + 1)]
    return [
        sum((1 << edges[place + 1]) - (1 << edges[place]) for place in range(blocks) if place not in left_out)
        for left_out in itertools.combinations(range(blocks), max_distance)
    ]

"""What is random in a dataset: a function of what it is drawn for, so that shards, workers and order do not matter."""

import hashlib
from collections.abc import Sequence

import numpy as np


def draw(*parts: int | str) -> float:
    """A number in [0, 1) that `parts` determine."""
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def choose(count: int, options: Sequence[int], *parts: int | str) -> list[int]:
    """`count` of the options in their order, or all where there are no more; each choice is equally likely."""
    if count >= len(options):
        return list(options)
    return sorted(sorted(options, key=lambda option: draw(*parts, option))[:count])


def key_hashes(keys: Sequence[str]) -> np.ndarray:
    """uint64 [N]: 64 bits of each key, to find it by."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)


def content_hash(content: bytes) -> int:
    """64 bits of a content, to find equal ones by."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")

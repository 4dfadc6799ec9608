"""Near-duplicate texts: one MinHash of the words of each text.

Texts are compared by their shingles, the runs of SHINGLE words. A word is a run of letters and digits without regard
to case; a character above U+07FF (CJK and others written without spaces) is a word of its own; everything else
separates. A text's signature is the smallest of its shingles' hashes. Two texts whose sets of shingles share the
fraction J of their union have equal signatures with probability J (Broder 1997, "On the resemblance and containment of
documents"), and always where they differ only in case, spacing and punctuation. It needs nothing but the text: any
shard finds the same.
"""

import functools
import unicodedata
from collections.abc import Sequence

import numpy as np

SHINGLE = 5
LONGEST = 1 << 20
"""Characters of a text that count: the rest of a longer one is not looked at."""

_AT_ONCE = 1 << 20  # bytes hashed together
_BASE = 0x9E3779B97F4A7C15 | 1  # odd, so it has an inverse modulo 2^64
_NONE = np.iinfo(np.uint64).max


def text_signatures(texts: Sequence[str]) -> np.ndarray:
    """uint64 [D]: equal for texts that are near-duplicates, with the probability said above."""
    normal = [_normal(text[:LONGEST]) for text in texts]
    found = []
    first, size = 0, 0
    for number, content in enumerate(normal):
        if size and size + len(content) > _AT_ONCE:
            found.append(_signatures(normal[first:number]))
            first, size = number, 0
        size += len(content) + 1
    found.append(_signatures(normal[first:]))
    return np.concatenate(found)


def _normal(text: str) -> bytes:
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return text.lower().encode("utf-8", "replace")


def _signatures(contents: Sequence[bytes]) -> np.ndarray:
    if not contents:
        return np.empty(0, np.uint64)
    # A separator at either end of each text: no word, and no shingle, reaches into the next.
    joined_B = np.frombuffer(b"\0" + b"\0".join(contents) + b"\0", np.uint8)
    text_starts_D = np.cumsum([1, *(len(content) + 1 for content in contents[:-1])])
    word_starts_W, hashes_W = _words(joined_B)
    first_D = np.searchsorted(word_starts_W, text_starts_D)
    end_D = np.append(first_D[1:], len(word_starts_W))
    found_D = np.full(len(contents), _NONE, np.uint64)
    has_words_D = end_D > first_D
    if has_words_D.any():
        shingles_W = _shingles(hashes_W, np.repeat(end_D, end_D - first_D), first_D[has_words_D])
        found_D[has_words_D] = np.minimum.reduceat(shingles_W, first_D[has_words_D])
    for wordless in np.flatnonzero(~has_words_D):
        found_D[wordless] = _mix(np.array([hash_bytes(contents[wordless])], np.uint64))[0]
    return found_D


def hash_bytes(content: bytes) -> int:
    """64 bits of a text as a polynomial of its bytes."""
    powers_B, _ = _powers(len(content))
    values_B = np.frombuffer(content, np.uint8).astype(np.uint64) + np.uint64(1)
    return int((values_B * powers_B).sum(dtype=np.uint64))


def _words(joined_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each word begins, and its hash: the polynomial of its bytes, by differences of one running sum."""
    is_word_B = _WORD_BYTES[joined_B]
    wide_B = joined_B >= 0xE0  # the first byte of a character above U+07FF
    for distance in (1, 2, 3):
        wide_B[distance:] |= (joined_B[:-distance] >= (0xF0 if distance == 3 else 0xE0)) & (
            (joined_B[distance:] & 0xC0) == 0x80
        )
    is_start_B = is_word_B & ((joined_B & 0xC0) != 0x80)
    is_start_B[1:] &= ~is_word_B[:-1] | wide_B[1:] | wide_B[:-1]
    starts_W = np.flatnonzero(is_start_B)
    if not len(starts_W):
        return starts_W, np.empty(0, np.uint64)
    powers_B, inverses_B = _powers(len(joined_B))
    terms_B = np.where(is_word_B, joined_B, 0).astype(np.uint64) * powers_B
    return starts_W, _mix(np.add.reduceat(terms_B, starts_W) * inverses_B[starts_W])


def _shingles(hashes_W: np.ndarray, end_W: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The hash of the shingle that begins at each word; the largest number where too few words of its text follow.

    `end_W` is one past the last word of each word's text, `first` the first word of each text: a text of fewer words
    is one shingle.
    """
    words = len(hashes_W)
    sums_W = hashes_W.copy()
    place_W = np.arange(words)
    for distance in range(1, min(SHINGLE, words)):
        factor = np.uint64(pow(_BASE, distance, 1 << 64))
        inside_W = place_W[: words - distance] + distance < end_W[: words - distance]
        sums_W[: words - distance] += np.where(inside_W, hashes_W[distance:] * factor, np.uint64(0))
    hashed_W = _mix(sums_W)
    whole_W = place_W + SHINGLE <= end_W
    whole_W[first] = True
    return np.where(whole_W, hashed_W, _NONE)


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele et al. 2014): every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.lru_cache(maxsize=1)
def _tables(size: int) -> tuple[np.ndarray, np.ndarray]:
    inverse = pow(_BASE, -1, 1 << 64)
    tables = []
    for base in (_BASE, inverse):
        table = np.full(size, np.uint64(base))
        table[0] = 1
        tables.append(np.cumprod(table, dtype=np.uint64))
    return tables[0], tables[1]


def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The powers of the base and of its inverse modulo 2^64, `size` of each."""
    powers, inverses = _tables(max(8 * _AT_ONCE, 1 << (size - 1).bit_length() if size else 1))
    return powers[:size], inverses[:size]


_WORD_BYTES = np.array([byte >= 0x80 or chr(byte).isalnum() for byte in range(256)])

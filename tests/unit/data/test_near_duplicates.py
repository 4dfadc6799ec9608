"""What counts as near-duplicate, and that it does not fall on two sides."""

import itertools
import math
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config import InputError
from megatron_ext.data import _clusters, near_duplicates
from megatron_ext.data.draws import key_hashes
from megatron_ext.data.near_duplicates import PictureClusters, clusters, picture_clusters
from megatron_ext.data.shingles import SHINGLE, text_signatures

WORDS = [f"word{number}" for number in range(400)] + ["été", "мир", "naïve", "x9"]


def random_text(rng: np.random.Generator, words: int) -> list[str]:
    return [WORDS[number] for number in rng.integers(0, len(WORDS), words)]


def shingles(text: str) -> set[tuple[str, ...]]:
    """Written from the definition, on strings."""
    words = []
    for character in unicodedata.normalize("NFKC", text).lower():
        is_word = ord(character) >= 0x80 or character.isalnum()
        if not is_word:
            words.append("")
        elif ord(character) > 0x7FF:
            words += [character, ""]
        elif words:
            words[-1] += character
        else:
            words.append(character)
    words = [word for word in words if word]
    return {tuple(words[first : first + SHINGLE]) for first in range(max(1, len(words) - SHINGLE + 1))}


def test_equal_but_for_case_spacing_and_punctuation():
    texts = [
        "The quick, brown fox jumps over the lazy dog!",
        "  the QUICK brown\nfox -- jumps over (the) lazy dog",
        "The quick, brown fox jumps over the lazy cat!",
        "中文的句子，没有空格。",
        "中文的句子，没 有\u3000空格。",
        "\uff21\uff22 one",  # full-width letters
        "ab ONE",
        "only four words here",
        "Only four, words; here",
        "only four words",
        "...",
        "!!!",
        "",
    ]
    found = text_signatures(texts).tolist()
    assert found[0] == found[1] != found[2]
    assert found[3] == found[4] and found[5] == found[6] and found[7] == found[8] != found[9]
    assert len({found[number] for number in (0, 3, 5, 7, 9, 10, 11, 12)}) == 8


def test_signatures_do_not_depend_on_the_batch(monkeypatch):
    rng = np.random.default_rng(0)
    texts = [" ".join(random_text(rng, int(rng.integers(0, 40)))) for _ in range(200)] + ["", "中" * 30]
    together = text_signatures(texts)
    assert together.tolist() == [text_signatures([text])[0] for text in texts]
    monkeypatch.setattr("megatron_ext.data.shingles._AT_ONCE", 64)
    assert together.tolist() == text_signatures(texts).tolist()


def test_equal_signatures_are_as_likely_as_the_texts_are_similar():
    """MinHash's property, with shingles counted on strings: 600 pairs of known similarity."""
    rng = np.random.default_rng(1)
    one, two, similarity = [], [], []
    for _ in range(600):
        words = random_text(rng, 60)
        other = list(words)
        for place in rng.integers(0, 60, rng.integers(0, 6)):
            other[place] = "changed"
        one.append(" ".join(words))
        two.append(". ".join(other))
        a, b = shingles(one[-1]), shingles(two[-1])
        similarity.append(len(a & b) / len(a | b))
    equal = text_signatures(one) == text_signatures(two)
    similarity = np.array(similarity)
    assert equal[similarity == 1].all()
    for low, high in ((0.3, 0.6), (0.6, 0.9)):
        chosen = (similarity >= low) & (similarity < high)
        # Standard deviation of the share of about 200 pairs: 0.035; measured differences: 0.04 and 0.01.
        assert abs(equal[chosen].mean() - similarity[chosen].mean()) < 0.1, (low, chosen.sum())


def test_words_are_those_of_the_definition():
    """Texts with equal sets of shingles, by the strings, have equal signatures, and others have not."""
    alphabet = ["a", "B", "9", " ", "-", "é", "ж", "中", "文", "\U0001f600", "\u3002", "ﬁ"]
    rng = np.random.default_rng(2)
    texts = ["".join(alphabet[n] for n in rng.integers(0, len(alphabet), 6)) for _ in range(3000)]
    by_shingles: dict[frozenset, set[int]] = {}
    for text, signature in zip(texts, text_signatures(texts).tolist(), strict=True):
        if re.search(r"\w", text):
            by_shingles.setdefault(frozenset(shingles(text)), set()).add(signature)
    assert all(len(signatures) == 1 for signatures in by_shingles.values())
    assert len(set.union(*by_shingles.values())) > 0.98 * len(by_shingles)


def brute_force(hashes: np.ndarray, distance: int) -> list[int]:
    """Single linkage by flooding."""
    values = hashes.tolist()
    found = [None] * len(values)
    for start in np.argsort(hashes, kind="stable"):
        waiting = [int(start)] if found[start] is None else []
        while waiting:
            node = waiting.pop()
            found[node] = values[start]
            near = [n for n, value in enumerate(values) if (value ^ values[node]).bit_count() <= distance]
            waiting += [n for n in near if found[n] is None]
    return found


@pytest.mark.parametrize("distance", [0, 1, 4, 7, 15])
def test_clusters_of_perceptual_hashes(distance):
    rng = np.random.default_rng(distance)
    centres = rng.integers(0, 1 << 63, 40, dtype=np.uint64)
    hashes = centres[rng.integers(0, 40, 200)]
    for _ in range(distance + 2):
        flip = rng.random(200) < 0.6
        hashes = np.where(flip, hashes ^ (np.uint64(1) << rng.integers(0, 64, 200).astype(np.uint64)), hashes)
    found = clusters(hashes, distance)
    assert found.tolist() == brute_force(hashes, distance)
    shuffled = rng.permutation(200)
    assert clusters(hashes[shuffled], distance).tolist() == found[shuffled].tolist()


BITS = st.integers(0, 2**64 - 1)


@settings(max_examples=40, deadline=None)
@given(
    hashes=st.lists(BITS | st.sampled_from([0, 1, 2**63, 2**64 - 1, 0xFF << 28]), max_size=25),
    flips=st.lists(st.tuples(st.integers(0, 24), st.sets(st.integers(0, 63), max_size=5)), max_size=25),
    distance=st.integers(0, 15),
    blocks=st.integers(1, 8),
)
def test_clusters_are_those_of_comparing_all_pairs(hashes, flips, distance, blocks):
    """Whatever the hashes, and by whatever blocks they are sorted."""
    near = [hashes[place % len(hashes)] ^ sum(1 << bit for bit in bits) for place, bits in flips if hashes]
    hashes_N = np.array(hashes + near, dtype=np.uint64)
    expected = brute_force(hashes_N, distance)
    assert clusters(hashes_N, distance).tolist() == expected
    if math.comb(distance + blocks, distance) <= 200:
        masks = np.array(list(choices_of_blocks(distance + blocks, distance)), dtype=np.uint64)
        unique_U, place_N = np.unique(hashes_N, return_inverse=True)
        assert unique_U[_clusters.near_roots(unique_U, masks, distance)][place_N].tolist() == expected


def choices_of_blocks(blocks: int, left_out: int) -> Iterator[int]:
    """The bits of all choices, written bit by bit."""
    block_of_bit = [bit * blocks // 64 for bit in range(64)]
    for without in itertools.combinations(range(blocks), left_out):
        yield sum(1 << bit for bit in range(64) if block_of_bit[bit] not in without)


def write_table(path: Path, **columns: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def clusters_of(found: PictureClusters, key: str) -> list[int]:
    return found.clusters_T[found.keys_T == key_hashes([key])[0]].tolist()


def test_tables_of_perceptual_hashes(tmp_path):
    tables = [
        write_table(tmp_path / "one.parquet", key=["a", "b", "c", "d", None], phash=[5, 4, -1, None, 3]),
        write_table(tmp_path / "two.parquet", key=["e", "f", "f"], phash=["f" * 16, "0f" * 8, "0f" * 7 + "1f"]),
    ]
    found = picture_clusters(tables, 1, tmp_path / "cache")
    assert [clusters_of(found, key) for key in "abcdex"] == [[4], [4], [2**64 - 1], [], [2**64 - 1], []]
    assert clusters_of(found, "f") == [int("0f" * 8, 16)] * 2
    assert len(picture_clusters([], 4, tmp_path / "cache").keys_T) == 0


def test_tables_that_cannot_be_read(tmp_path):
    (tmp_path / "one.txt").write_text("x")
    for path in (
        tmp_path / "one.txt",
        write_table(tmp_path / "bare.parquet", key=["a"]),
        write_table(tmp_path / "long.parquet", key=["a"], phash=["1" * 17]),
        write_table(tmp_path / "words.parquet", key=["a"], phash=["red"]),
        write_table(tmp_path / "numbers.parquet", key=[1], phash=[1]),
    ):
        with pytest.raises(InputError, match=f"cannot read columns key and phash of .*{path.name}"):
            picture_clusters([path], 1, tmp_path / "cache")


def test_clusters_are_computed_once_for_the_same_tables(tmp_path, monkeypatch):
    table = write_table(tmp_path / "one.parquet", key=["a", "b"], phash=[5, 4])
    first = picture_clusters([table], 1, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(near_duplicates, "clusters", None)  # whoever computes again fails
        again = picture_clusters([table], 1, tmp_path / "cache")
        assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
        with pytest.raises(TypeError):
            picture_clusters([table], 2, tmp_path / "cache")
    write_table(tmp_path / "one.parquet", key=["a", "bb"], phash=[5, 400])
    assert clusters_of(picture_clusters([table], 1, tmp_path / "cache"), "bb") == [400]
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2

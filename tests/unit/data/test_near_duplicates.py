"""What counts as near-duplicate, and that it does not fall on two sides."""

import re
import unicodedata

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_ext.config import InputError
from megatron_ext.data.near_duplicates import PictureClusters, clusters
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


@pytest.mark.parametrize("distance", [0, 1, 4, 7])
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


def test_tables_of_perceptual_hashes(tmp_path):
    rows = {"key": ["a", "b", "c", "d"], "phash": [5, 4, -1, None]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "one.parquet")
    rows = {"key": ["e", "f"], "phash": ["ffffffffffffffff", "0f0f0f0f0f0f0f0f"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "two.parquet")
    groups = PictureClusters([tmp_path / "one.parquet", tmp_path / "two.parquet"], 1)
    assert groups.group("a") == groups.group("b") != groups.group("c") == groups.group("e") != groups.group("f")
    assert (groups.group("d"), groups.group("x")) == ("d", "x")
    assert PictureClusters([], 4).group("a") == "a"
    with pytest.raises(InputError, match="cannot read columns key and phash of .*one.txt"):
        (tmp_path / "one.txt").write_text("x")
        PictureClusters([tmp_path / "one.txt"], 1)
    pyarrow.parquet.write_table(pyarrow.table({"key": ["a"]}), tmp_path / "bare.parquet")
    with pytest.raises(InputError, match="cannot read columns key and phash of .*bare.parquet"):
        PictureClusters([tmp_path / "bare.parquet"], 1)

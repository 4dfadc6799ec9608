"""Fingerprints of pictures, pairs of near hashes without comparing all, and which of them are dropped."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from megatron_ext.curate.duplicates import (
    EXACT,
    MAX_DISTANCE,
    NEAR,
    SAME_PIXELS,
    Fingerprints,
    find_duplicates,
    pairs_within,
)
from megatron_ext.curate.hashes import perceptual_hash, pixels_digest
from megatron_ext.media import decode_picture
from tests.unit.curate.drawn import clouds, encoded
from tests.unit.curate.test_colour import PHOTOGRAPHS


def plain_hash(picture_HWC: np.ndarray) -> int:
    """Frequency by frequency, from the definition of the cosine transform."""
    import cv2

    grey = cv2.resize(cv2.cvtColor(picture_HWC, cv2.COLOR_RGB2GRAY).astype(np.float32), (32, 32), interpolation=3)
    values = [
        sum(
            float(grey[y, x]) * math.cos(math.pi * (y + 0.5) * v / 32) * math.cos(math.pi * (x + 0.5) * u / 32)
            for y in range(32)
            for x in range(32)
        )
        for v in range(1, 9)
        for u in range(1, 9)
    ]
    middle = sum(sorted(values)[31:33]) / 2
    return int("".join("1" if value > middle else "0" for value in values), 2)


def bits(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def planted(count: int, distance: int, seed: int) -> np.ndarray:
    """Random hashes, a tenth of which are others with some bits turned."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 1 << 64, count, dtype=np.uint64)
    for place in range(count // 10):
        turned = rng.choice(64, rng.integers(0, distance + 3), replace=False)
        hashes[-1 - place] = hashes[place] ^ np.bitwise_or.reduce(np.uint64(1) << turned.astype(np.uint64), initial=0)
    return np.unique(hashes)


def test_the_hash_is_its_definition():
    for seed in range(2):
        assert perceptual_hash(clouds(seed, 80, 60)) == plain_hash(clouds(seed, 80, 60))
    assert perceptual_hash(np.full((50, 50, 3), 90, dtype=np.uint8)) is None


def test_the_hash_stays_and_tells_apart():
    hashes = []
    for path in PHOTOGRAPHS:
        picture_HWC = decode_picture(path.read_bytes())
        image, own = Image.fromarray(picture_HWC), perceptual_hash(picture_HWC)
        same = (
            decode_picture(encoded(picture_HWC, "JPEG", quality=20)),
            np.asarray(image.resize((85, 85), Image.Resampling.LANCZOS)),
            np.asarray(image.convert("L").convert("RGB")),
        )
        assert max(bits(own, perceptual_hash(other)) for other in same) <= 2
        assert bits(own, perceptual_hash(np.asarray(ImageEnhance.Brightness(image).enhance(1.15)))) <= 6
        hashes.append(own)
    apart = [bits(one, other) for place, one in enumerate(hashes) for other in hashes[:place]]
    assert min(apart) >= 20


def test_digests_of_pixels():
    picture = clouds(0)
    assert pixels_digest(picture) == pixels_digest(decode_picture(encoded(picture, "BMP")))
    assert pixels_digest(picture) != pixels_digest(picture.reshape(48, 192, 3))


@pytest.mark.parametrize("distance", [0, 1, 4, MAX_DISTANCE])
def test_pairs_are_those_of_comparing_all(distance):
    hashes = planted(300, distance, seed=distance)
    low, high, differing = pairs_within(hashes, distance)
    expected = [
        (i, j, d)
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if (d := bits(int(hashes[i]), int(hashes[j]))) <= distance
    ]
    assert list(zip(low.tolist(), high.tolist(), differing.tolist(), strict=True)) == expected


def test_pairs_among_many():
    """All pairs would be 5e9 comparisons; the planted ones are found in seconds (0.4 on one core)."""
    hashes = planted(100_000, 4, seed=0)
    start = time.process_time()
    low, _, _ = pairs_within(hashes, 4)
    assert 5_000 < len(low) < 10_000 and time.process_time() - start < 10


def fingerprints(hashes: list[int | None], files: list[int] | None = None, pixels: list[int] | None = None):
    count = len(hashes)
    return Fingerprints(
        bytes_N=np.array(files or range(count)),
        pixels_N=np.array(pixels or range(count)),
        hash_N=np.array([value or 0 for value in hashes], dtype=np.uint64),
        has_hash_N=np.array([value is not None for value in hashes]),
    )


def test_the_best_of_a_chain_stays_and_does_not_drag_all_along():
    """b is near a, c near b but not near a: b goes, c stays."""
    found = find_duplicates(fingerprints([0b0, 0b1111, 0b11111111, None, None]), 4)
    assert {rank: (item.reason, item.kept, item.distance) for rank, item in found.items()} == {1: (NEAR, 0, 4)}
    assert not find_duplicates(fingerprints([0b0, 0b1111]), 3)
    assert not find_duplicates(fingerprints([0b0, 0b0]), None)


def test_kinds_of_duplicates_and_who_is_kept_instead():
    found = find_duplicates(fingerprints([7, 7, 6, 6, 7], files=[1, 1, 2, 3, 4], pixels=[1, 1, 2, 2, 3]), 4)
    assert {rank: (item.reason, item.kept, item.distance) for rank, item in found.items()} == {
        1: (EXACT, 0, 0),
        2: (NEAR, 0, 1),
        3: (SAME_PIXELS, 0, 1),  # its like, 2, goes for 0
        4: (NEAR, 0, 0),
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=25), st.integers(0, 4))
def test_what_is_kept_is_far_apart_and_what_goes_is_near_something_better(values, distance):
    found = find_duplicates(fingerprints(values), distance)
    kept = [rank for rank in range(len(values)) if rank not in found]
    for one in kept:
        assert all(bits(values[one], values[other]) > distance for other in kept if other != one)
    for rank, item in found.items():
        assert item.kept < rank and item.kept in kept and bits(values[rank], values[item.kept]) <= distance

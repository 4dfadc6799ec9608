"""PSNR, SSIM and Frechet distance against loops and closed forms; the reference codecs."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ext.config import InputError
from tokenizer_train.vision.codecs import Bicubic, jpeg_within, scan_bytes
from tokenizer_train.vision.quality import FeatureStatistics, frechet_distance, psnr, ssim


def pictures(seed: int, shape: tuple[int, ...] = (2, 18, 14, 3)) -> np.ndarray:
    """Random, but with neighbours that resemble each other."""
    noise = np.random.default_rng(seed).integers(0, 256, shape)
    return ((noise + np.roll(noise, 1, axis=1) + np.roll(noise, 1, axis=2)) // 3).astype(np.uint8)


def ssim_by_loops(original: np.ndarray, decoded: np.ndarray) -> float:
    """One picture: the formula at each place and channel, one after the other."""
    window = np.array([[np.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)])
    window /= window.sum()
    values = []
    for top in range(original.shape[0] - 10):
        for left in range(original.shape[1] - 10):
            for channel in range(3):
                x, y = (a[top : top + 11, left : left + 11, channel].astype(float) for a in (original, decoded))
                mean_x, mean_y = (window * x).sum(), (window * y).sum()
                var_x, var_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
                covariance = (window * (x - mean_x) * (y - mean_y)).sum()
                c1, c2 = 2.55**2, 7.65**2
                luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
                values.append(luminance * (2 * covariance + c2) / (var_x + var_y + c2))
    return float(np.mean(values))


def test_ssim_is_the_formula():
    original, decoded = pictures(0), pictures(1)
    decoded = ((original.astype(int) * 2 + decoded) // 3).astype(np.uint8)
    found = ssim(original, decoded)
    # Measured 4e-16.
    np.testing.assert_allclose(found, [ssim_by_loops(a, b) for a, b in zip(original, decoded, strict=True)], rtol=1e-10)
    assert 0.2 < found[0] < 0.99
    np.testing.assert_allclose(ssim(original, original), 1.0)
    with pytest.raises(ValueError, match="10x20"):
        ssim(np.zeros((1, 10, 20, 3), np.uint8), np.zeros((1, 10, 20, 3), np.uint8))


def statistics_of(*parts: np.ndarray) -> FeatureStatistics:
    statistics = FeatureStatistics()
    for part in parts:
        statistics.add(torch.from_numpy(part))
    return statistics


@pytest.mark.parametrize("count", [200, 5], ids=["more vectors than features", "fewer"])
def test_frechet_distance_is_the_formula(count):
    random = np.random.default_rng(0)
    a = random.normal(size=(count, 8)) @ random.normal(size=(8, 8)) + 1
    b = random.normal(size=(count, 8)) @ random.normal(size=(8, 8))
    first, second = statistics_of(a[: count // 2], a[count // 2 :]), statistics_of(b)
    np.testing.assert_allclose(first.mean_D, a.mean(0), rtol=1e-12)
    np.testing.assert_allclose(first.covariance_DD, np.cov(a.T), rtol=1e-9, atol=1e-12)
    # The general eigenvalues of the product, which is not symmetric: another way than the product's.
    covariances = np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * roots
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)  # measured 1e-8 where rank is missing
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_of_independent_features_is_that_of_their_deviations():
    grid = np.stack(np.meshgrid([-1.0, 1.0], [-1.0, 1.0], [-1.0, 1.0]), -1).reshape(-1, 3)  # covariance 8/7 I
    scale, other, shift = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 0.5]), np.array([0.0, 1.0, -1.0])
    found = frechet_distance(statistics_of(grid * scale), statistics_of(grid * other + shift))
    assert found == pytest.approx((shift**2).sum() + 8 / 7 * ((scale - other) ** 2).sum())


def test_jpeg_keeps_to_its_bits_and_uses_them():
    picture = np.asarray(Image.fromarray(pictures(3, (8, 8, 3))).resize((64, 48), Image.Resampling.BICUBIC))
    previous = 0.0
    for bits in (40, 400, 2000, 8000):
        decoded, used = jpeg_within(picture, bits)
        assert decoded.shape == picture.shape and used <= bits
        assert psnr(picture, decoded) > previous
        previous = psnr(picture, decoded)
    assert used > 0.8 * 8000 or previous > 35
    assert (jpeg_within(picture, 10**9)[0] == jpeg_within(picture, 10**8)[0]).all(), "quality has a top"
    with pytest.raises(InputError, match="3 bits for a picture of 48x64"):
        jpeg_within(picture, 3)


def test_the_scan_of_a_jpeg_is_what_follows_its_headers():
    sizes = {}
    for side in (8, 64):
        file = io.BytesIO()
        Image.new("RGB", (side, side), (10, 200, 30)).save(file, format="JPEG", quality=50, subsampling="4:2:0")
        data = file.getvalue()
        sizes[side] = scan_bytes(data), len(data)
        at = data.rindex(b"\xff\xda")
        assert sizes[side][0] == len(data) - at - 2 - int.from_bytes(data[at + 2 : at + 4], "big") - 2
    assert sizes[64][1] - sizes[8][1] == sizes[64][0] - sizes[8][0], "the headers are the same"


def test_bicubic_is_pillow_s():
    frames = pictures(4, (2, 3, 16, 24, 3))
    coded = Bicubic(8)(frames, is_clip=True)
    small = Image.fromarray(frames[1, 2]).resize((3, 2), Image.Resampling.BICUBIC)
    assert (coded.decoded_BTHWC[1, 2] == np.asarray(small.resize((24, 16), Image.Resampling.BICUBIC))).all()
    assert coded.bits == 3 * 2 * 3 * 3 * 8 and coded.codes is None

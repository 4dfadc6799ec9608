"""How far pictures are from others: PSNR, SSIM, Frechet distance of features. Functions of arrays.

Shapes: ... any leading axes, N pictures, C colour channels, H W pixels, D features.
"""

import cv2
import numpy as np
import torch
from torch import Tensor

PEAK = 255
SSIM_WINDOW, SSIM_DEVIATION = 11, 1.5
SSIM_CONSTANTS = ((0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2)  # Wang et al. 2004, section III.B


def psnr(original: np.ndarray, decoded: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 arrays in decibels: 10 log10(255^2 / mean squared error)."""
    error = np.mean((original.astype(np.float64) - decoded.astype(np.float64)) ** 2)
    return float(10 * np.log10(PEAK**2 / max(error, 1e-12)))


def ssim(original_NHWC: np.ndarray, decoded_NHWC: np.ndarray) -> np.ndarray:
    """Structural similarity [N] of uint8 pictures: mean over channels and over the places where the window fits.

    Wang et al. 2004: Gaussian window of 11 x 11, deviation 1.5, no downscaling. torchmetrics 1.9 also counts windows
    over a mirrored border (a difference of 1e-4 at 64 x 64), and takes two seconds to import.

    Raises:
        ValueError: a side below 11.
    """
    if min(original_NHWC.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"pictures of {original_NHWC.shape[1]}x{original_NHWC.shape[2]}: SSIM needs {SSIM_WINDOW}")
    pairs = zip(original_NHWC, decoded_NHWC, strict=True)
    return np.array([_ssim(original_HWC, decoded_HWC) for original_HWC, decoded_HWC in pairs])


def _ssim(original_HWC: np.ndarray, decoded_HWC: np.ndarray) -> float:
    """Of one picture: memory does not grow with a clip, and OpenCV's filter is nine times as fast as torch's."""
    x, y = original_HWC.astype(np.float64), decoded_HWC.astype(np.float64)
    mean_x, mean_y, square_x, square_y, product = map(_windowed, (x, y, x * x, y * y, x * y))
    variance_x, variance_y, covariance = square_x - mean_x**2, square_y - mean_y**2, product - mean_x * mean_y
    small, large = SSIM_CONSTANTS
    likeness = (2 * mean_x * mean_y + small) * (2 * covariance + large)
    likeness /= (mean_x**2 + mean_y**2 + small) * (variance_x + variance_y + large)
    return float(likeness.mean())


def _windowed(map_HWC: np.ndarray) -> np.ndarray:
    """Gaussian means of every channel, where the whole window lies inside."""
    weights = cv2.getGaussianKernel(SSIM_WINDOW, SSIM_DEVIATION, cv2.CV_64F)
    border = SSIM_WINDOW // 2
    return cv2.sepFilter2D(map_HWC, cv2.CV_64F, weights, weights)[border:-border, border:-border]


class FeatureStatistics:
    """Mean and covariance of feature vectors that come in batches; memory does not grow with their number."""

    def __init__(self) -> None:
        self.count = 0
        self._sum_D: Tensor | None = None
        self._products_DD: Tensor | None = None

    def add(self, features_ND: Tensor) -> None:
        """More vectors."""
        features_ND = features_ND.detach().double().cpu()
        total_D, products_DD = features_ND.sum(0), features_ND.T @ features_ND
        self.count += len(features_ND)
        self._sum_D = total_D if self._sum_D is None else self._sum_D + total_D
        self._products_DD = products_DD if self._products_DD is None else self._products_DD + products_DD

    @property
    def mean_D(self) -> Tensor:
        """Mean vector."""
        return self._sum_D / self.count

    @property
    def covariance_DD(self) -> Tensor:
        """Covariance, divided by count - 1 as numpy's."""
        mean_D = self.mean_D
        return (self._products_DD - self.count * torch.outer(mean_D, mean_D)) / (self.count - 1)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared Frechet (2-Wasserstein) distance of the two normal distributions (Heusel et al. 2017, equation 6).

    |m - n|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)). The last trace is the sum of the roots of the eigenvalues of
    A^(1/2) B A^(1/2), which is symmetric where A B is not, so that rank-deficient covariances (fewer pictures than
    features) give no complex numbers.
    """
    a_DD, b_DD = first.covariance_DD, second.covariance_DD
    values_D, vectors_DD = torch.linalg.eigh(a_DD)
    root_DD = (vectors_DD * values_D.clamp(min=0).sqrt()) @ vectors_DD.T
    both_D = torch.linalg.eigvalsh(root_DD @ b_DD @ root_DD)
    traces = a_DD.trace() + b_DD.trace() - 2 * both_D.clamp(min=0).sqrt().sum()
    return float((first.mean_D - second.mean_D).square().sum() + traces)

"""How exactly numbers in fp32 are multiplied."""

import contextlib
from collections.abc import Iterator

import torch

MULTIPLIERS = (
    torch.backends.cudnn.conv,
    torch.backends.cudnn.rnn,  # older switches of torch refuse to be read where it is not as convolutions are
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.conv,
    torch.backends.mkldnn.matmul,
)
"""What of torch multiplies fp32, with a precision of its own."""


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """Convolutions and matrix products of fp32 as IEEE 754 has them, whatever the process has chosen.

    torch's own choice on GPUs is TF32 for convolutions: 10 bits of mantissa instead of 23. A process that asks for
    `torch.set_float32_matmul_precision("medium")` gets as few from matrix products, on CPUs too.
    """
    before = [multiplier.fp32_precision for multiplier in MULTIPLIERS]
    try:
        for multiplier in MULTIPLIERS:
            multiplier.fp32_precision = "ieee"
        yield
    finally:
        for multiplier, precision in zip(MULTIPLIERS, before, strict=True):
            multiplier.fp32_precision = precision

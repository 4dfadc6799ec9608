"""Training in float64, for tests of what two ways to compute the same have in common.

In float32 a comparison after a few steps measures the processor: sums in another order differ in the last bits, and an
optimizer that divides by small roots, signs of losses and adaptive weights make more of that with every step. In
float64 the same differences stay ten orders of magnitude below those of another computation.
"""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """While open, new tensors are float64, and what the code widens to float32 becomes float64."""
    single, default = torch.Tensor.float, torch.get_default_dtype()
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float = single
        torch.set_default_dtype(default)

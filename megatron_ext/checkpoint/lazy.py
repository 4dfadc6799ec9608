"""A tensor that stays where it is until some of its rows are asked for.

Conversions work on these, so that they need memory for some rows and not for a model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE_BYTES = 1 << 24
"""Size of the pieces in which tensors travel: small enough that malloc uses their memory again (measured: a third of
the system time of 64 MB), large beside the cost of a call."""


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """Shape and type of a tensor, and how to read its rows. A tensor without dimensions has one row: itself."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]
    """(start, stop) -> rows [start, stop); the caller does not write into them."""

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        """A tensor that is in memory already."""
        read = (lambda start, stop: tensor[start:stop]) if tensor.ndim else (lambda start, stop: tensor)
        return cls(shape=tuple(tensor.shape), dtype=tensor.dtype, read=read)

    @property
    def rows(self) -> int:
        """Length of dimension 0."""
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Size of the whole."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def whole(self) -> Tensor:
        """All rows."""
        return self.read(0, self.rows)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of pieces of at most PIECE_BYTES, or of one row."""
        step = max(1, PIECE_BYTES * self.rows // max(1, self.nbytes))
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """The same values in another type."""
        return LazyTensor(shape=self.shape, dtype=dtype, read=lambda start, stop: self.read(start, stop).to(dtype))

"""Mapped archives hold what numpy reads."""

import numpy as np
import pytest

from megatron_ext.data.npz import map_npz


def test_the_arrays_are_numpys(tmp_path):
    arrays = {
        "bytes": np.arange(13, dtype=np.uint8),  # what follows is not aligned to its items
        "numbers": np.arange(5, dtype=np.int64),
        "pairs": np.arange(8, dtype=np.int32).reshape(-1, 2),
        "nothing": np.empty((0, 2), dtype=np.int32),
    }
    with (tmp_path / "a.npz").open("wb") as file:
        np.savez(file, **arrays)
    found = map_npz(tmp_path / "a.npz")
    assert found.keys() == arrays.keys() and isinstance(found["numbers"], np.memmap)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype and not found[name].flags.writeable or not array.size


def test_a_compressed_archive_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", a=np.arange(5))
    with pytest.raises(ValueError, match="a.npy is compressed"):
        map_npz(tmp_path / "a.npz")

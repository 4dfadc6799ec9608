"""Near-duplicate pictures: clusters of perceptual hashes, from the tables that curation writes.

Two pictures are near-duplicates when their 64-bit perceptual hashes differ in at most `distance` bits; so are, in
turn, their near-duplicates (single linkage). A cluster is named by its smallest hash. The whole table decides, not the
pictures of a shard.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.data.draws import key_hashes

_BITS = 64


def clusters(hashes_N: np.ndarray, distance: int) -> np.ndarray:
    """uint64 [N]: the smallest hash of each hash's cluster.

    Hashes within `distance` bits agree in one of distance + 1 bands of their bits; only hashes of an equal band are
    compared. Time grows with the square of the hashes that share a band: 64 / (distance + 1) bits tell
    2 ** (64 / (distance + 1)) apart.
    """
    unique_U, place_N = np.unique(hashes_N.astype(np.uint64), return_inverse=True)
    if distance == 0:
        return unique_U[place_N]
    parent_U = np.arange(len(unique_U))
    edges = np.linspace(0, _BITS, distance + 2).astype(int)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        band_U = (unique_U >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order_U = np.argsort(band_U, kind="stable")
        bounds = np.flatnonzero(np.diff(band_U[order_U])) + 1
        for group in np.split(order_U, bounds):
            _join(unique_U, group, distance, parent_U)
    roots_U = np.array([_root(parent_U, node) for node in range(len(unique_U))], dtype=np.int64)
    return unique_U[roots_U][place_N]


def _join(unique_U: np.ndarray, group: np.ndarray, distance: int, parent_U: np.ndarray) -> None:
    """Unite the members of a group that are near each other."""
    for number, node in enumerate(group[:-1]):
        others = group[number + 1 :]
        near = others[np.bitwise_count(unique_U[others] ^ unique_U[node]) <= distance]
        for other in near:
            one, two = _root(parent_U, int(node)), _root(parent_U, int(other))
            parent_U[max(one, two)] = min(one, two)  # hashes ascend: a root is its cluster's smallest


def _root(parent_U: np.ndarray, node: int) -> int:
    while parent_U[node] != node:
        parent_U[node] = parent_U[parent_U[node]]
        node = int(parent_U[node])
    return node


class PictureClusters:
    """Key of a picture -> its cluster; 16 bytes per picture of the tables.

    Args:
        tables: Parquet files with columns `key` (string) and `phash` (64 bits: an integer, or 16 hexadecimal digits).
        distance: see above.

    Raises:
        InputError: a file that has no such columns.
    """

    def __init__(self, tables: Sequence[Path], distance: int) -> None:
        parts = [_read_table(path) for path in tables]
        keys_N = np.concatenate([np.empty(0, np.uint64), *(keys for keys, _ in parts)])
        cluster_N = clusters(np.concatenate([np.empty(0, np.uint64), *(hashes for _, hashes in parts)]), distance)
        order_N = np.argsort(keys_N, kind="stable")
        self._keys_N, self._cluster_N = keys_N[order_N], cluster_N[order_N]

    def group(self, key: str) -> str:
        """What pictures that belong together have in common: the cluster, or the key of a picture in no table."""
        (wanted,) = key_hashes([key])
        place = int(np.searchsorted(self._keys_N, wanted))
        if place == len(self._keys_N) or self._keys_N[place] != wanted:
            return key
        return f"phash:{int(self._cluster_N[place]):016x}"


def _read_table(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of keys, perceptual hashes; rows without one are left out."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            found = [(np.empty(0, np.uint64), np.empty(0, np.uint64))]
            for batch in file.iter_batches(columns=["key", "phash"]):
                keys, values = (batch.column(name).to_pylist() for name in ("key", "phash"))
                known = [(key, value) for key, value in zip(keys, values, strict=True) if value is not None]
                bits = [int(value, 16) if isinstance(value, str) else value % (1 << _BITS) for _, value in known]
                found.append((key_hashes([key for key, _ in known]), np.array(bits, dtype=np.uint64)))
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"duplicates: cannot read columns key and phash of {path}: {reason}") from None
    return np.concatenate([keys for keys, _ in found]), np.concatenate([values for _, values in found])

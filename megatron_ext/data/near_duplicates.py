"""Near-duplicate pictures: clusters of perceptual hashes, from the tables that curation writes.

Two pictures are near-duplicates when their 64-bit perceptual hashes differ in at most `distance` bits; so are, in
turn, their near-duplicates (single linkage). A cluster is named by its smallest hash. The whole table decides, not the
pictures of a shard: it is computed once, and found by all shards.

Shapes: N hashes, U distinct ones, T rows of tables.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_ext.config import InputError, reason_of
from megatron_ext.data.array_cache import cached_arrays, digest, stamp
from megatron_ext.data.draws import key_hashes
from megatron_ext.media.hash_blocks import Speed, block_masks

CLUSTERS_VERSION = 1
"""Raised whenever the same tables give other clusters."""

_SPEED = Speed(compared=5e8, sorted=2e7)  # of _clusters.cpp, measured on one core (benchmarks/near_duplicates.py)


def clusters(hashes_N: np.ndarray, distance: int) -> np.ndarray:
    """uint64 [N]: the smallest hash of each hash's cluster (`_clusters.cpp`)."""
    unique_U, place_N = np.unique(hashes_N.astype(np.uint64), return_inverse=True)
    if distance == 0 or not len(unique_U):
        return unique_U[place_N]
    from megatron_ext.data import _clusters  # here: who holds nothing out needs no extension

    masks = np.array(block_masks(distance, len(unique_U), _SPEED), dtype=np.uint64)
    # The hashes ascend: a component's root, its smallest node, is its smallest hash.
    return unique_U[_clusters.near_roots(unique_U, masks, distance)][place_N]


class PictureClusters(NamedTuple):
    """The clusters of the pictures in some tables: row t says that key t is in cluster t. A key may have several."""

    keys_T: np.ndarray
    """uint64, ascending: hashes of keys."""
    clusters_T: np.ndarray
    """uint64: smallest hash of the cluster."""


def picture_clusters(tables: Sequence[Path], distance: int, cache: Path) -> PictureClusters:
    """The clusters of tables, memory-mapped; computed and written into `cache` first where they are not there.

    Args:
        tables: Parquet files with columns `key` (string) and `phash` (64 bits: an integer, or 16 hexadecimal digits).
        distance: see above.
        cache: folder for the results of all such tables.

    Raises:
        InputError: a file that has no such columns; `cache` cannot be written.
    """

    def build() -> dict[str, np.ndarray]:
        parts = [_read_table(path) for path in tables]
        keys_T = np.concatenate([np.empty(0, np.uint64), *(keys for keys, _ in parts)])
        clusters_T = clusters(np.concatenate([np.empty(0, np.uint64), *(hashes for _, hashes in parts)]), distance)
        order_T = np.argsort(keys_T, kind="stable")
        return PictureClusters(keys_T[order_T], clusters_T[order_T])._asdict()

    facts = {"version": CLUSTERS_VERSION, "distance": distance, "tables": list(map(stamp, tables))}
    arrays = cached_arrays(
        cache / digest(facts), PictureClusters._fields, facts, build,
        what="the clusters of near-duplicates", remedy="give another output_prefix",
    )  # fmt: skip
    return PictureClusters(**arrays)


def _read_table(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of keys, perceptual hashes; rows without key or hash are left out."""
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    found = [(np.empty(0, np.uint64), np.empty(0, np.uint64))]
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["key", "phash"]):
                keys, hashes = batch.column("key"), batch.column("phash")
                is_known = pyarrow.compute.and_(keys.is_valid(), hashes.is_valid())
                keys, hashes = keys.filter(is_known), hashes.filter(is_known)
                if pyarrow.types.is_integer(hashes.type):
                    bits = np.asarray(hashes).astype(np.uint64)  # a negative one is the same bits
                else:
                    bits = np.array([int(value, 16) for value in hashes.to_pylist()], dtype=np.uint64)
                found.append((key_hashes(keys.to_pylist()), bits))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, pyarrow.ArrowException) as error:
        reason = reason_of(error)
        raise InputError(f"duplicates: cannot read columns key and phash of {path}: {reason}") from None
    return np.concatenate([keys for keys, _ in found]), np.concatenate([values for _, values in found])

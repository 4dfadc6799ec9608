"""The held-out side of media, decided once for all shards, so that no picture stands in both splits.

**Which are one.** Samples of one key, of equal codes, and of one cluster of near-duplicates; and so on in chains. Such
a group is drawn as a whole, by its smallest hash or else by one of its keys.

**Rows with several.** A row is drawn with its first picture. The others of a row that is drawn are held out with it,
unless a row that stays in training shows one of them: then they stay there, and the row stands on neither side. Nor
does a row that is not drawn but shows a picture that is. Both are dropped, counted and named. So hardly more is held
out than was drawn, and hardly more is dropped than that times the pictures of a row, however often one is shown.

Shapes: N samples, H held-out keys, R rows, M references of rows to samples.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_ext.data.array_cache import cached_arrays, digest, stamp
from megatron_ext.data.drafts import ROW_FIELDS, media_keys
from megatron_ext.data.draws import content_hash, draw, key_hashes
from megatron_ext.data.forked import map_forked
from megatron_ext.data.near_duplicates import PictureClusters, picture_clusters
from megatron_ext.data.sources import TokenizedFolder, TokenizedShard
from megatron_ext.media.texts import BadText, read_rows

HELD_OUT_VERSION = 1
"""Raised whenever the same inputs give other sides."""

CACHE = "preprocess_cache"
"""Folder beside the datasets."""

_log = logging.getLogger(__name__)


class Media(NamedTuple):
    """All samples, in any order."""

    keys_N: np.ndarray
    """uint64: hashes of their keys."""
    contents_N: np.ndarray
    """uint64: hashes of their codes."""
    draws_N: np.ndarray
    """float64: what is drawn for the key by itself, in [0, 1)."""

    @classmethod
    def join(cls, parts: Sequence["Media"]) -> "Media":
        empty = cls(np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0))
        return cls(*(np.concatenate(arrays) for arrays in zip(empty, *parts, strict=True)))


class References(NamedTuple):
    """The media that rows name."""

    keys_M: np.ndarray
    """uint64: hashes of the keys, row after row, in the order of the row."""
    counts_R: np.ndarray
    """int64: how many each row names, at least 1."""

    @classmethod
    def join(cls, parts: Sequence["References"]) -> "References":
        empty = cls(np.empty(0, np.uint64), np.empty(0, np.int64))
        return cls(*(np.concatenate(arrays) for arrays in zip(empty, *parts, strict=True)))


class HeldOut:
    """Which media are held out, by key."""

    def __init__(self, keys_H: np.ndarray) -> None:
        self._keys_H = keys_H  # ascending

    def __contains__(self, key: str) -> bool:
        (wanted,) = key_hashes([key])
        place = int(np.searchsorted(self._keys_H, wanted))
        return place < len(self._keys_H) and bool(self._keys_H[place] == wanted)


def held_out_keys(media: Media, rows: References, clusters: PictureClusters, fraction: float) -> np.ndarray:
    """uint64 [H], ascending: hashes of the keys of the media that are held out."""
    groups_N, draws_N = _groups(media, clusters)
    order_N = np.argsort(media.keys_N, kind="stable")
    sorted_N = media.keys_N[order_N]
    is_drawn_N = draws_N < fraction  # by group: read at groups_N only
    is_held_N = is_drawn_N.copy()
    rows = _known(rows, sorted_N)
    if len(rows.counts_R):
        groups_M = groups_N[order_N[np.searchsorted(sorted_N, rows.keys_M)]]
        first_R = np.cumsum(rows.counts_R) - rows.counts_R

        def shows(is_so_N: np.ndarray) -> np.ndarray:
            """[R] whether a row names media of such a group."""
            return np.logical_or.reduceat(is_so_N[groups_M], first_R)

        is_in_training_N = np.zeros(len(is_drawn_N), dtype=bool)
        is_in_training_N[groups_M[np.repeat(~shows(is_drawn_N), rows.counts_R)]] = True
        is_whole_R = is_drawn_N[groups_M[first_R]] & ~shows(is_in_training_N)
        is_held_N[groups_M[np.repeat(is_whole_R, rows.counts_R)]] = True
    return np.unique(media.keys_N[is_held_N[groups_N]])


def _groups(media: Media, clusters: PictureClusters) -> tuple[np.ndarray, np.ndarray]:
    """The group of each sample, a number below the second array's length, and what is drawn for each group."""
    from megatron_ext.data import _clusters  # here: who holds nothing out needs no extension

    samples = len(media.keys_N)
    first_N = np.searchsorted(clusters.keys_T, media.keys_N, side="left")
    counts_N = np.searchsorted(clusters.keys_T, media.keys_N, side="right") - first_N
    ends = np.cumsum(counts_N)
    rows = np.arange(counts_N.sum()) + np.repeat(first_N - (ends - counts_N), counts_N)
    # A node for each sample, and after them one for each cluster.
    hashes_C, cluster_P = np.unique(clusters.clusters_T[rows], return_inverse=True)
    edges = [
        _equal(media.keys_N),
        _equal(media.contents_N),
        (np.repeat(np.arange(samples), counts_N), samples + cluster_P),
    ]
    ones, others = (np.concatenate(ends).astype(np.int64) for ends in zip(*edges, strict=True))
    roots = _clusters.edge_roots(samples + len(hashes_C), ones, others)
    groups_N, roots_C = roots[:samples].astype(np.int64), roots[samples:]
    draws_N = np.ones(samples)
    by_key = np.lexsort((media.keys_N, groups_N))
    group, first = np.unique(groups_N[by_key], return_index=True)
    draws_N[group] = media.draws_N[by_key[first]]
    group, first = np.unique(roots_C, return_index=True)  # hashes ascend: the first is the smallest
    draws_N[group] = [draw("valid", f"phash:{number:016x}") for number in hashes_C[first].tolist()]
    return groups_N, draws_N


def _equal(values_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of places that hold equal values: enough of them to join all of one value."""
    order_N = np.argsort(values_N, kind="stable")
    is_next = values_N[order_N[:-1]] == values_N[order_N[1:]]
    return order_N[:-1][is_next], order_N[1:][is_next]


def _known(rows: References, sorted_N: np.ndarray) -> References:
    """The rows all of whose media are there; the others are no documents."""
    if not len(rows.counts_R) or not len(sorted_N):
        return References.join([])
    place_M = np.minimum(np.searchsorted(sorted_N, rows.keys_M), len(sorted_N) - 1)
    is_known_M = sorted_N[place_M] == rows.keys_M
    is_known_R = np.logical_and.reduceat(is_known_M, np.cumsum(rows.counts_R) - rows.counts_R)
    return References(rows.keys_M[np.repeat(is_known_R, rows.counts_R)], rows.counts_R[is_known_R])


Tar = tuple[TokenizedFolder, TokenizedShard]


def find_held_out(
    tars: Sequence[Tar], rows: Sequence[Path], tables: Sequence[Path], *, fraction: float, distance: int,
    cache: Path, workers: int,
) -> HeldOut:  # fmt: skip
    """Which media are held out; computed from all tars, rows and tables once and written into `cache`.

    Raises:
        InputError: an unreadable or damaged file; `cache` cannot be written; a worker process was killed.
    """
    if not fraction or not tars:
        return HeldOut(np.empty(0, np.uint64))
    clusters = picture_clusters(tables, distance, cache / "near_duplicates")
    facts = {"version": HELD_OUT_VERSION, "valid_fraction": fraction, "duplicate_distance": distance}
    media = [(shard.name, shard.sha256, (folder.path / shard.name).stat().st_size) for folder, shard in tars]
    name = digest([facts, media, list(map(stamp, rows)), list(map(stamp, tables))])

    def build() -> dict[str, np.ndarray]:
        _log.warning("reading %d tars and %d files of rows to divide them: once, for all shards", len(tars), len(rows))
        media = Media.join(list(map_forked(_see_tar, tars, workers)))
        references = References.join(list(map_forked(_see_rows, rows, workers)))
        return {"keys": held_out_keys(media, references, clusters, fraction)}

    arrays = cached_arrays(
        cache / "held_out" / name, ["keys"], facts, build,
        what="the held-out keys", remedy="give another output_prefix",
    )  # fmt: skip
    return HeldOut(arrays["keys"])


def _see_tar(tar: Tar) -> Media:
    folder, shard = tar
    seen = [(folder.key_of(raw), content_hash(raw.parts.get("codes.npy", b""))) for raw in folder.read_shard(shard)]
    keys = [key for key, _ in seen]
    contents_N = np.array([content for _, content in seen], dtype=np.uint64)
    return Media(key_hashes(keys), contents_N, np.array([draw("valid", key) for key in keys]))


def _see_rows(path: Path) -> References:
    rows = (item[1] for item in read_rows(path, ROW_FIELDS, lambda size: None) if not isinstance(item, BadText))
    named = [keys for keys in map(media_keys, rows) if keys]
    counts_R = np.array([len(keys) for keys in named], dtype=np.int64)
    return References(key_hashes([key for keys in named for key in keys]), counts_R)

"""Finds tokenized pictures and clips by key: what rows refer to."""

from collections.abc import Sequence

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.data.draws import key_hashes
from megatron_ext.data.sources import MediaSample, TokenizedFolder


class MediaIndex:
    """Where each sample of some folders is: 20 bytes per sample, found by reading all their shards once.

    Raises:
        InputError: an unreadable shard, or a key that comes twice.
    """

    def __init__(self, folders: Sequence[TokenizedFolder]) -> None:
        self._tars = [(folder, shard) for folder in folders for shard in folder.shards]
        hashes, tars, offsets = [np.empty(0, np.uint64)], [np.empty(0, np.uint32)], [np.empty(0, np.int64)]
        for number, (folder, shard) in enumerate(self._tars):
            found = [(folder.parse(raw).key, raw.offset) for raw in folder.read_shard(shard)]
            hashes.append(key_hashes([key for key, _ in found]))
            offsets.append(np.array([offset for _, offset in found], dtype=np.int64))
            tars.append(np.full(len(found), number, dtype=np.uint32))
        hashes_N = np.concatenate(hashes)
        order_N = np.argsort(hashes_N, kind="stable")
        self._hashes_N = hashes_N[order_N]
        self._tars_N, self._offsets_N = np.concatenate(tars)[order_N], np.concatenate(offsets)[order_N]
        twice = np.flatnonzero(np.diff(self._hashes_N) == 0)
        if len(twice):
            one, two = (self._sample(int(twice[0]) + each) for each in (0, 1))
            raise InputError(
                f"row_media has two samples of key {one.key!r} (or {two.key!r}): give folders of other keys"
            )

    def __call__(self, key: str) -> MediaSample | None:
        """The sample of that key; None where there is none."""
        (wanted,) = key_hashes([key])
        place = int(np.searchsorted(self._hashes_N, wanted))
        if place == len(self._hashes_N) or self._hashes_N[place] != wanted:
            return None
        sample = self._sample(place)
        return sample if sample.key == key else None

    def _sample(self, place: int) -> MediaSample:
        folder, shard = self._tars[self._tars_N[place]]
        return folder.read_at(shard, int(self._offsets_N[place]))

"""The inputs of a curation in pieces: each is measured and written at once, by whichever job it falls to.

A tar is a piece, listed when its turn comes: ten thousand of them are dealt by their names alone. Folders, manifests
and single files are cut into pieces of equal size. Pieces depend on the inputs only, so what becomes of a picture does
not depend on the number of jobs.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config import InputError
from megatron_ext.media import Fault, Listing, Part, Sample, listing_of, parts_of, readable_name


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some of the inputs."""

    part: Part
    listing: Listing | None
    """None of a tar, which is listed when it is asked for."""

    first: int = 0
    stop: int = 0
    """Places in the listing."""

    def entries(self) -> list[Sample | Fault]:
        """What is to be measured, and what listing found unusable."""
        if self.listing is not None:
            return self.listing.entries(self.first, self.stop)
        listing = listing_of(self.part)
        return listing.entries(0, len(listing))

    def size(self) -> int:
        """Bytes of the pictures, or of the tar: known without listing it, to tell how much work is left."""
        if self.listing is None:
            return sum(path.stat().st_size for path in self.part.paths)
        return sum(entry.media.size for entry in self.entries() if isinstance(entry, Sample))


def pieces_of(inputs: Sequence[str], size: int) -> tuple[list[Piece], str]:
    """The pieces in the order of the inputs, and a digest that changes with that order and names, sizes and times of
    files.

    Raises:
        InputError: as `parts_of` and `listing_of`; there is nothing.
    """
    pieces: list[Piece] = []
    digest = hashlib.sha256()
    for part in parts_of(inputs):
        if part.layout == "tar":
            pieces.append(Piece(part=part, listing=None))
            known = _stamps(part.paths)
        else:
            listing = listing_of(part)
            starts = range(0, len(listing), size)
            pieces += (
                Piece(part=part, listing=listing, first=first, stop=min(first + size, len(listing))) for first in starts
            )
            is_table = part.layout == "manifest"
            known = _stamps(part.paths) if is_table else list(map(_known_of, listing.entries(0, len(listing))))
        digest.update(json.dumps([part.layout, [readable_name(str(path)) for path in part.paths], known]).encode())
    if not pieces:
        raise InputError(f"inputs {', '.join(inputs)} hold nothing: their tables have no rows")
    return pieces, digest.hexdigest()


def _stamps(paths: Iterable[Path]) -> list[tuple[int, int]]:
    return [(status.st_size, status.st_mtime_ns) for status in (path.stat() for path in paths)]


def _known_of(entry: Sample | Fault) -> list[str | int]:
    if isinstance(entry, Fault):
        return [entry.source, entry.reason]
    extents = [extent for extent in (entry.media, entry.text, entry.fields) if extent is not None]
    return [entry.source, *(number for extent in extents for number in (extent.size, extent.stamp))]

"""The last word on pictures: which are duplicates of others, seen over the pieces of all jobs.

In memory are some numbers, three digests and the source of each picture that passed the filters, about 300 bytes; all
else is read piece by piece.
"""

import bisect
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_ext.curate.duplicates import EXACT, NEAR, SAME_PIXELS, Fingerprints, find_duplicates
from megatron_ext.curate.picture_filters import PictureFiltersConfig
from megatron_ext.curate.picture_rows import NO_PICTURE
from megatron_ext.curate.report import choose_examples
from megatron_ext.curate.table import PartTable, Row
from megatron_ext.curate.verdict import DROPPED, KEPT, UNREADABLE

SAME_KEY = "duplicate_key"
"""Reason: another picture that is kept has the key."""

REASONS = (NO_PICTURE, UNREADABLE, "resolution", "aesthetic", "colour", "text", EXACT, SAME_PIXELS, NEAR, SAME_KEY)
"""In the order in which they are asked."""

MEASURED = ("shorter_side", "aesthetic", "text", "colour")
"""What the page shows histograms of."""

EXAMPLES = 9
"""Rows of each verdict and reason that the page shows."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the page tells of all rows."""

    reasons: Counter[str] = field(default_factory=Counter)
    """Reason -> rows; the empty one is that of kept rows."""

    rescued: int = 0
    scores: dict[tuple[str, bool], np.ndarray] = field(default_factory=dict)
    """(one of MEASURED, kept?) -> values, NaN where not measured."""

    examples: dict[str, list[Row]] = field(default_factory=dict)
    """Reason, or `rescued`, or nothing for kept -> some rows."""


def decide(table: PartTable, count: int, filters: PictureFiltersConfig) -> Summary:
    """Drop duplicates among the rows of parts 0 to `count` - 1, write all rows with their final verdicts."""
    dropped = _duplicates(table, count, filters)
    places = sorted(dropped)
    summary = _Gathering()

    def final() -> Iterator[pa.Table]:
        start = 0
        for part in range(count):
            rows = table.read(part)
            first, last = (bisect.bisect_left(places, place) for place in (start, start + len(rows)))
            rows = _overruled(rows, {place - start: dropped[place] for place in places[first:last]})
            start += len(rows)
            summary.add(rows)
            yield rows

    table.write_merged(final())
    return summary.finished()


def _duplicates(table: PartTable, count: int, filters: PictureFiltersConfig) -> dict[int, tuple[str, str]]:
    """Place among all rows -> (reason, detail) of those to be dropped as duplicates."""
    passed, sources = _passed(table, count)
    # The best first: the largest, of these the largest file, of these the first.
    rank_N = np.lexsort((passed["place"], -passed["size"], -passed["area"]))
    passed = {name: values_N[rank_N] for name, values_N in passed.items()}

    def source(rank: int) -> str:
        return sources[int(rank_N[rank])].as_py()

    found: dict[int, tuple[str, str]] = {}
    if filters.drop_duplicates:
        fingerprints = Fingerprints(
            bytes_N=passed["sha256"],
            pixels_N=passed["pixels"],
            hash_N=passed["phash"],
            has_hash_N=passed["has_hash"],
        )
        for rank, duplicate in find_duplicates(fingerprints, filters.max_hash_distance).items():
            near = f" ({duplicate.distance} of 64 bits differ)" if duplicate.reason == NEAR else ""
            found[rank] = (duplicate.reason, f"as {source(duplicate.kept)}{near}")
    owner: dict[bytes, int] = {}
    for rank in np.argsort(passed["place"]).tolist():
        if rank not in found and (first := owner.setdefault(passed["key"][rank], rank)) != rank:
            found[rank] = (SAME_KEY, f"the key of {source(first)}")
    return {int(passed["place"][rank]): why for rank, why in found.items()}


def _passed(table: PartTable, count: int) -> tuple[dict[str, np.ndarray], pa.ChunkedArray]:
    """What duplicates are told by, of the rows that passed the other filters: [N] arrays, and their sources."""
    columns = ["key", "source", "size", "height", "width", "sha256", "pixels", "phash", "verdict"]
    gathered: dict[str, list[np.ndarray]] = {}
    sources, start = [], 0
    for part in range(count):
        rows = table.read(part, columns)
        is_kept = pc.equal(rows["verdict"], KEPT)
        places = np.arange(start, start + len(rows))[is_kept.to_numpy()]
        start += len(rows)
        rows = rows.filter(is_kept)
        height, width, size = (rows[name].to_numpy().astype(np.int64) for name in ("height", "width", "size"))
        arrays = {
            "place": places,
            "area": height * width,
            "size": size,
            "sha256": _digests(bytes.fromhex(text[:32]) for text in rows["sha256"].to_pylist()),
            "pixels": _digests(map(bytes.fromhex, rows["pixels"].to_pylist())),
            "key": _digests(hashlib.sha256(key.encode()).digest()[:16] for key in rows["key"].to_pylist()),
            "phash": rows["phash"].fill_null(0).to_numpy().astype(np.uint64),
            "has_hash": rows["phash"].is_valid().to_numpy(),
        }
        for name, values in arrays.items():
            gathered.setdefault(name, []).append(values)
        sources += rows["source"].cast(pa.large_string()).chunks  # 32-bit offsets end at 2 GiB of text
    joined = {name: np.concatenate(parts) for name, parts in gathered.items()}
    return joined, pa.chunked_array(sources, pa.large_string())


def _digests(values: Iterable[bytes]) -> np.ndarray:
    """[N] of 16 bytes each."""
    return np.array(list(values), dtype="S16")


def _overruled(rows: pa.Table, dropped: dict[int, tuple[str, str]]) -> pa.Table:
    """The rows with other verdicts in the places of `dropped`."""
    if not dropped:
        return rows
    columns = {name: rows[name].to_pylist() for name in ("verdict", "reason", "detail")}
    for place, (reason, detail) in dropped.items():
        columns["verdict"][place], columns["reason"][place], columns["detail"][place] = DROPPED, reason, detail
    for name, values in columns.items():
        number = rows.schema.get_field_index(name)
        rows = rows.set_column(number, rows.schema.field(number), pa.array(values, pa.string()))
    return rows


class _Gathering:
    """The summary while the parts go by."""

    def __init__(self) -> None:
        self._reasons: Counter[str] = Counter()
        self._rescued = 0
        self._scores: dict[tuple[str, bool], list[np.ndarray]] = {
            (name, is_kept): [] for name in MEASURED for is_kept in (True, False)
        }
        self._examples: dict[str, list[Row]] = {}

    def add(self, rows: pa.Table) -> None:
        self._reasons.update(rows["reason"].to_pylist())
        is_kept = pc.equal(rows["verdict"], KEPT)
        self._rescued += pc.sum(pc.and_(is_kept, rows["rescued"])).as_py() or 0
        shorter = pc.min_element_wise(rows["height"], rows["width"], skip_nulls=False)
        columns = {"shorter_side": shorter, **{name: rows[name] for name in MEASURED[1:]}}
        for name, values in columns.items():
            for kept, chosen in ((True, is_kept), (False, pc.invert(is_kept))):
                self._scores[name, kept].append(_floats(values.filter(chosen)))
        self._add_examples(rows)

    def finished(self) -> Summary:
        return Summary(
            reasons=self._reasons,
            rescued=self._rescued,
            scores={name: np.concatenate([np.empty(0, np.float32), *parts]) for name, parts in self._scores.items()},
            examples={reason: choose_examples(rows, EXAMPLES) for reason, rows in self._examples.items()},
        )

    def _add_examples(self, rows: pa.Table) -> None:
        """The first few of each reason in each part may be shown: looking at all would cost more than deciding."""
        reasons, rescued = rows["reason"].to_pylist(), rows["rescued"].to_pylist()
        places: dict[str, list[int]] = {}
        for place, (reason, was_rescued) in enumerate(zip(reasons, rescued, strict=True)):
            found = places.setdefault("rescued" if was_rescued and not reason else reason, [])
            if len(found) < EXAMPLES:
                found.append(place)
        for reason, chosen in places.items():
            self._examples.setdefault(reason, []).extend(rows.take(chosen).to_pylist())
            self._examples[reason] = choose_examples(self._examples[reason], EXAMPLES)


def _floats(values: pa.ChunkedArray) -> np.ndarray:
    return values.cast(pa.float32()).to_numpy()  # null becomes NaN

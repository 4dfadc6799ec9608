"""The rows of a piece of the inputs: pictures decoded by processes, rated here, their text looked for by processes."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa

from megatron_ext.curate.picture_filters import PictureFiltersConfig, Scores, judge_picture, wants_text
from megatron_ext.curate.pictures import Measured, call, measure, measure_text
from megatron_ext.curate.table import Row, schema_of
from megatron_ext.curate.verdict import DROPPED, UNREADABLE, Verdict
from megatron_ext.media import Fault, MediaError, Sample, readable_name
from megatron_ext.media.workers import WorkerPool

NO_PICTURE = "no_picture"
"""Reason of the rows of clips."""

SCHEMA = schema_of(
    [
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("sha256", pa.string()),
        pa.field("pixels", pa.string()),
        pa.field("phash", pa.uint64()),
        pa.field("colour", pa.float64()),
        pa.field("aesthetic", pa.float64()),
        pa.field("text", pa.float64()),
        pa.field("rescued", pa.bool_(), nullable=False),
    ]
)
"""A score is null where it was not needed."""


class Rater(Protocol):
    """What gives aesthetic scores."""

    side: int
    """Pixels of the squares it takes."""

    def rate(self, squares_BHWC: np.ndarray) -> np.ndarray:
        """[B] scores of uint8 squares."""


class PictureMeter:
    """Measures pieces."""

    def __init__(
        self,
        filters: PictureFiltersConfig,
        rater: Rater | None,
        *,
        batch_size: int,
        workers: int,
        timeout_s: float = 0.0,
    ) -> None:
        """`rater` None: no picture has an aesthetic score. `batch_size` pictures are rated at once, in `workers`
        processes others are decoded, each for `timeout_s` at most (0: no limit); 0 decode in this one. Use it as a
        context."""
        self._filters = filters
        self._rater = rater
        self._batch_size = batch_size
        self._pool: WorkerPool = WorkerPool(call, workers, timeout_s=timeout_s)

    def __enter__(self) -> "PictureMeter":
        self._pool.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.__exit__(*error)

    def rows(self, entries: Sequence[Sample | Fault], advance: Callable[[int], None]) -> list[Row]:
        """A row for each entry of a piece, in order; `advance` is told of the bytes of pictures done."""
        samples = [entry for entry in entries if isinstance(entry, Sample) and entry.kind == "image"]
        results = list(self._measured(samples, advance))
        texts = iter(self._texts(samples, results))
        rows, place = [], iter(zip(samples, results, strict=True))
        for entry in entries:
            if isinstance(entry, Fault):
                rows.append(_fault_row(entry))
            elif entry.kind != "image":
                verdict = Verdict(verdict=DROPPED, reason=NO_PICTURE, detail="a clip: curate_videos looks at clips")
                rows.append(_row(entry, verdict))
            else:
                sample, result = next(place)
                rows.append(self._judged(sample, result, next(texts)))
        return rows

    def _measured(
        self, samples: list[Sample], advance: Callable[[int], None]
    ) -> Iterator[tuple[Measured, float | None] | MediaError]:
        """What was measured of each, with its aesthetic score; batches are filled in the order of the samples, so that
        a score does not depend on how many processes or jobs there are."""
        clip_side = self._rater.side if self._rater else None
        tasks = (functools.partial(measure, sample, self._filters, clip_side) for sample in samples)
        waiting: list[Measured | MediaError] = []
        squares: list[np.ndarray] = []
        for sample, result in zip(samples, self._pool.map(tasks), strict=True):
            waiting.append(result)
            advance(sample.media.size)
            if isinstance(result, Measured) and result.square_HWC is not None:
                squares.append(result.square_HWC)
            if len(squares) == self._batch_size:
                yield from self._rated(waiting, squares)
                waiting, squares = [], []
        yield from self._rated(waiting, squares)

    def _rated(
        self, waiting: list[Measured | MediaError], squares: list[np.ndarray]
    ) -> Iterator[tuple[Measured, float | None] | MediaError]:
        scores = iter(self._rater.rate(np.stack(squares)).tolist() if self._rater and squares else ())
        for result in waiting:
            if isinstance(result, MediaError):
                yield result
            else:
                score = next(scores) if result.square_HWC is not None else None
                yield dataclasses.replace(result, square_HWC=None), score  # a piece's squares would be much memory

    def _texts(
        self, samples: list[Sample], results: list[tuple[Measured, float | None] | MediaError]
    ) -> list[float | MediaError | None]:
        """Share of text of those whose verdict hangs on it, None of the others."""
        wanted = [
            not isinstance(result, MediaError) and wants_text(_scores(*result), self._filters) for result in results
        ]
        edge = self._filters.text_shorter_edge
        tasks = (
            functools.partial(measure_text, sample, edge)
            for sample, is_wanted in zip(samples, wanted, strict=True)
            if is_wanted
        )
        found = self._pool.map(tasks)
        return [next(found) if is_wanted else None for is_wanted in wanted]

    def _judged(
        self,
        sample: Sample,
        result: tuple[Measured, float | None] | MediaError,
        text: float | MediaError | None,
    ) -> Row:
        fault = next((item for item in (result, text) if isinstance(item, MediaError)), None)
        if fault is not None:
            return _row(sample, Verdict(verdict=UNREADABLE, reason=UNREADABLE, detail=str(fault)))
        measured, aesthetic = result
        verdict, rescued = judge_picture(_scores(measured, aesthetic, text), self._filters)
        row = _row(sample, verdict)
        row |= {name: getattr(measured, name) for name in ("height", "width", "sha256", "pixels", "phash", "colour")}
        return row | {
            "captions": list(measured.captions),
            "aesthetic": aesthetic,
            "text": text,
            "rescued": rescued,
        }


def _scores(measured: Measured, aesthetic: float | None, text: float | None = None) -> Scores:
    return Scores(height=measured.height, width=measured.width, colour=measured.colour, aesthetic=aesthetic, text=text)


def _row(sample: Sample, verdict: Verdict) -> Row:
    return {
        "key": sample.key,
        "kind": sample.kind,
        "source": readable_name(sample.source),
        "path": readable_name(str(sample.media.path)),
        "offset": sample.media.offset,
        "size": sample.media.size,
        "captions": [],
        "rescued": False,
        **vars(verdict),
    }


def _fault_row(fault: Fault) -> Row:
    verdict = Verdict(verdict=UNREADABLE, reason=UNREADABLE, detail=fault.reason)
    place = {"key": fault.key, "kind": "", "source": fault.source, "path": fault.source, "offset": 0, "size": 0}
    return {**place, "captions": [], "rescued": False, **vars(verdict)}

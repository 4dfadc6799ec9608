"""All documents of a dataset, read in order by several threads: what they are made of, and whether each is one.

Nearly all of the work is numpy's on large arrays, which lets other threads run; the disk is soon what limits it.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from megatron_ext.data.indexed import DocumentDataset
from megatron_ext.vocab import IdCounts, Sweep

RUN_IDS = 1 << 20
"""Ids that a thread takes at once: what it derives from them fits into a core's caches."""

COUNTED_IDS = 1 << 30
"""Ids of the largest dataset that `count_ids` reads whole; of a larger one it reads this many, evenly spread."""

PERCENTILES = (5, 50, 95)
MOST_NAMED = 20

Result = TypeVar("Result")


@dataclass(frozen=True)
class Offence:
    """A document that is none."""

    document: int
    key: str
    position: int
    """The first id at fault; the number of ids where some are missing."""
    reason: str

    def __str__(self) -> str:
        return f"document {self.document:,} ({self.key}) at position {self.position:,}: {self.reason}"


@dataclass(frozen=True)
class Judgement:
    """What the grammar says of a dataset."""

    counts: IdCounts
    wrong: int
    """Documents that are none."""
    first: tuple[Offence, ...]
    """The first MOST_NAMED of them, in the order of the dataset."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Ids per document."""

    shortest: int
    percentiles: tuple[int, ...]
    """As PERCENTILES says."""
    longest: int

    @classmethod
    def of(cls, lengths: np.ndarray) -> "Lengths":
        """Of the documents of `lengths` [N], N >= 1."""
        places = [min(len(lengths) - 1, len(lengths) * share // 100) for share in PERCENTILES]
        ordered = np.partition(lengths, places)
        return cls(shortest=int(lengths.min()), percentiles=tuple(ordered[places].tolist()), longest=int(lengths.max()))


def judge(dataset: DocumentDataset, workers: int, advance: Callable[[int], None]) -> Judgement:
    """Every document held against the grammar; `advance` is told of ids."""
    sweep = Sweep(dataset.vocabulary)
    total = IdCounts(0, 0, 0)
    wrong = 0
    first: list[Offence] = []

    def of_run(begin: int, end: int) -> tuple[int, IdCounts, list[tuple]]:
        ids_N, length_D = read_run(dataset, begin, end)
        return begin, sweep.count(ids_N), sweep.faults(ids_N, length_D)

    for begin, counts, faults in _in_order(of_run, runs(dataset.lengths, RUN_IDS), workers):
        total = _add(total, counts)
        wrong += len(faults)
        for number, violation in faults[: MOST_NAMED - len(first)]:
            document = begin + number
            first.append(Offence(document, dataset.sidecar.key(document), violation.position, violation.reason))
        advance(sum(counts))
    return Judgement(total, wrong, tuple(first))


def count_ids(dataset: DocumentDataset, workers: int, advance: Callable[[int], None]) -> IdCounts:
    """Ids by kind: of all documents, or of as many evenly spread as have COUNTED_IDS ids; `advance` is told of ids."""
    sweep = Sweep(dataset.vocabulary)
    total = IdCounts(0, 0, 0)
    step = -(-dataset.manifest.num_ids // COUNTED_IDS)
    chosen = (run for number, run in enumerate(runs(dataset.lengths, RUN_IDS)) if number % step == 0)
    for counts in _in_order(lambda *run: sweep.count(read_run(dataset, *run)[0]), chosen, workers):
        total = _add(total, counts)
        advance(sum(counts))
    return total


def runs(lengths: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """[begin, end) of documents that together have about `size` ids; one alone may have more."""
    ends = np.cumsum(lengths, dtype=np.int64)
    begin = 0
    while begin < len(lengths):
        read = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, read + size, side="right")))
        yield begin, end
        begin = end


def read_run(dataset: DocumentDataset, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 ids of documents [begin, end), which follow one another on disk, and their lengths."""
    length_D = dataset.lengths[begin:end]
    return dataset.ids(begin, 0, int(length_D.sum(dtype=np.int64))), length_D


def default_workers() -> int:
    """Threads that may run at the same time."""
    return len(os.sched_getaffinity(0))


def _in_order(
    function: Callable[[int, int], Result], arguments: Iterator[tuple[int, int]], workers: int
) -> Iterator[Result]:
    """Results of `function` in the order of its arguments, with a few calls under way at any moment."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for run in arguments:
                waiting.append(pool.submit(function, *run))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _add(one: IdCounts, other: IdCounts) -> IdCounts:
    return IdCounts(*(a + b for a, b in zip(one, other, strict=True)))

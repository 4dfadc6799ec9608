"""Captioning many samples: questions are prepared by threads and kept in flight; every answer goes to the journal."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_ext.config import BadSamples
from megatron_ext.curate.caption_journal import CaptionJournal
from megatron_ext.curate.caption_server import CaptionServer, ServerConfig, Unanswered
from megatron_ext.curate.captions import Piece, ShownConfig, pieces_of, question, record
from megatron_ext.media import MediaError, Sample, readable_name


def media_stamp(sample: Sample) -> list[int]:
    """Size and modification time of a sample's media file: an answer holds for just that file."""
    return [sample.media.size, sample.media.stamp]


def finished_record(sample: Sample, journal: CaptionJournal) -> dict[str, Any] | None:
    """The line of a sample whose pieces are all answered; None where one is missing."""
    media = media_stamp(sample)
    first = journal.answer(sample.key, 0, media)
    if first is None:
        return None
    pieces = [journal.answer(sample.key, number, media) for number in range(first["num_pieces"])]
    return None if None in pieces else record(sample, pieces)


Waiting = asyncio.Queue[tuple[Sample, Piece, int] | None]
"""(sample, piece, number of its pieces), and None for an asker to end at."""


class Captioning:
    """One pass over samples."""

    def __init__(
        self,
        samples: Sequence[Sample],
        shown: ShownConfig,
        journal: CaptionJournal,
        bad: BadSamples,
        *,
        advance: Callable[[int], None],
    ) -> None:
        """`samples` are those without a `finished_record`; `advance` is told how many more are done with."""
        self._samples = samples
        self._shown = shown
        self._journal = journal
        self._bad = bad
        self._advance = advance
        self._left: dict[str, int] = {}
        self._faulty: set[str] = set()
        """Keys of those in `bad`: a sample is one bad sample, however many of its pieces get no answer."""

    def run(self, config: ServerConfig, *, decoders: int, total: int) -> CaptionServer:
        """Ask about all samples; those that get no answer are in `bad`. `total` is what its share is of.

        Raises:
            InputError: the server is of no use, too many samples are bad, or the disk is full. Answers stay.
        """
        with ThreadPoolExecutor(decoders) as pool:
            return asyncio.run(self._run(config, pool, total))

    async def _run(self, config: ServerConfig, pool: ThreadPoolExecutor, total: int) -> CaptionServer:
        waiting: Waiting = asyncio.Queue(2 * config.concurrency)
        try:
            async with CaptionServer(config) as server, asyncio.TaskGroup() as group:
                group.create_task(self._plan(waiting, pool, config.concurrency, total))
                for _ in range(config.concurrency):
                    group.create_task(self._ask(waiting, server, pool, total))
        except BaseExceptionGroup as faults:
            raise faults.exceptions[0] from None
        return server

    async def _plan(
        self,
        waiting: Waiting,
        pool: ThreadPoolExecutor,
        askers: int,
        total: int,
    ) -> None:
        """Put every missing piece into the queue, then an end for each asker."""
        loop = asyncio.get_running_loop()
        for sample in self._samples:
            try:
                if readable_name(sample.source) != sample.source:
                    raise MediaError("its name is not UTF-8, which answers hold keys in: rename it")
                pieces = await loop.run_in_executor(pool, pieces_of, sample, self._shown)
            except MediaError as error:
                self._note_fault(sample, 0, str(error), total)
                self._advance(1)
                continue
            media = media_stamp(sample)
            missing = [piece for piece in pieces if self._journal.answer(sample.key, piece.number, media) is None]
            self._left[sample.key] = len(missing)
            for piece in missing:
                await waiting.put((sample, piece, len(pieces)))
        for _ in range(askers):
            await waiting.put(None)

    async def _ask(
        self,
        waiting: Waiting,
        server: CaptionServer,
        pool: ThreadPoolExecutor,
        total: int,
    ) -> None:
        loop = asyncio.get_running_loop()
        while (item := await waiting.get()) is not None:
            sample, piece, num_pieces = item
            try:
                content = await loop.run_in_executor(pool, question, sample, piece, self._shown)
                caption = await server.ask(content)
            except (MediaError, Unanswered) as error:
                self._note_fault(sample, piece.number, str(error), total)
            else:
                times = {"start_s": piece.start_s, "end_s": piece.end_s, "num_frames": len(piece.stamps) or 1}
                self._add(sample, piece.number, {"num_pieces": num_pieces, **times, "caption": caption})
            self._left[sample.key] -= 1
            if not self._left[sample.key]:
                del self._left[sample.key]
                self._advance(1)

    def _note_fault(self, sample: Sample, number: int, reason: str, total: int) -> None:
        if readable_name(sample.source) == sample.source:
            self._add(sample, number, {"fault": reason})
        if sample.key not in self._faulty:
            self._faulty.add(sample.key)
            self._bad.add(sample.source, reason)
            self._bad.check(total)

    def _add(self, sample: Sample, number: int, fields: dict[str, Any]) -> None:
        self._journal.add({"key": sample.key, "piece": number, "media": media_stamp(sample), **fields})

"""What a text tokenizer is trained and measured on: two bounded samples of a corpus of any size, read once.

Which documents are held out depends on their text alone, so that a copy of one is never trained on, in whatever file
it stands. Which lines are kept of what does not fit depends on the seed and on the lines, neither on the order of the
files nor on how they are cut up.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_ext.config import BadSamples
from megatron_ext.media import Fault, MediaError, Part, listing_of, parts_of
from megatron_ext.media.texts import BadText, find_text_files, read_texts
from megatron_ext.observe.progress import progress

MAX_LINE = 4096
"""Characters of a line; longer ones are cut. No piece is longer than 16, so a cut hides next to nothing."""

_HASH_BYTES = 8
_AT_ONCE = 1024


class LineSample:
    """At most `limit_bytes` of the lines added: those whose hashes are the smallest, in the order of the hashes.

    The result is a function of the key and of which lines were added how often.
    """

    def __init__(self, limit_bytes: int, key: bytes) -> None:
        self._limit_bytes = limit_bytes
        self._key = key
        self._largest_first: list[tuple[int, str]] = []
        self._refused_from = 1 << (8 * _HASH_BYTES)
        self.bytes = 0
        """UTF-8 bytes of the lines kept."""

    def add(self, line: str) -> None:
        """One more line, which must be valid Unicode."""
        content = line.encode()
        place = _hash(content, self._key)
        if place >= self._refused_from:
            return
        heapq.heappush(self._largest_first, (-place, line))
        self.bytes += len(content)
        while self.bytes > self._limit_bytes:
            place, line = heapq.heappop(self._largest_first)
            self.bytes -= len(line.encode())
            # Whatever would come after it is refused from now on, also where it would fit into the gap.
            self._refused_from = -place

    def lines(self) -> tuple[str, ...]:
        """The lines kept; the sample is empty afterwards, because two copies of a large one need not fit."""
        self._largest_first.sort(reverse=True)
        kept = tuple(line for _, line in self._largest_first)
        self._largest_first.clear()
        return kept


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What was read, and the samples of it."""

    lines: tuple[str, ...]
    """The training sample."""

    held_out: tuple[str, ...]
    """The sample of the held-out documents' lines."""

    documents: int
    """Texts and captions read."""

    characters: int
    """Characters of all lines read."""

    is_sampled: bool
    """Whether the training sample is smaller than what was there."""


@dataclass(frozen=True, kw_only=True)
class CorpusFiles:
    """Where the documents come from."""

    texts: tuple[Path, ...]
    """Text files, each once, sorted."""

    media: tuple[Part, ...]
    """Folders, tars and manifests of captioned pictures and clips."""

    @classmethod
    def find(cls, input_patterns: tuple[str, ...], caption_patterns: tuple[str, ...]) -> "CorpusFiles":
        """Raises InputError: a pattern matches nothing."""
        media = parts_of(caption_patterns, option="captions")
        return cls(texts=tuple(find_text_files(input_patterns, option="input")), media=tuple(media))

    def documents(self, text_field: str, bad: BadSamples, console: Console) -> Iterator[str]:
        """Lines of plain text, texts of JSON lines and Parquet, captions; what cannot be used goes to `bad`.

        Raises:
            InputError: a file cannot be read.
        """
        if self.texts:
            size = sum(path.stat().st_size for path in self.texts)
            with progress(f"text, {len(self.texts)} files", size, "bytes", console) as advance:
                for path in self.texts:
                    yield from _texts(path, text_field, bad, advance)
        if self.media:
            with progress("captions", len(self.media), "folders and tars", console) as advance:
                for part in self.media:
                    yield from _captions(part, bad)
                    advance(1)


def sample_corpus(
    documents: Iterable[str], *, seed: int, held_out_fraction: float, sample_bytes: int, held_out_bytes: int
) -> Corpus:
    """Read all documents once and keep at most so many bytes of each part; lines without text do not count."""
    train = LineSample(sample_bytes, f"sample {seed}".encode())
    held_out = LineSample(held_out_bytes, b"held out lines")
    boundary = held_out_fraction * (1 << (8 * _HASH_BYTES))
    count = characters = train_bytes = 0
    for document in documents:
        count += 1
        is_held_out = _hash(document.encode(), b"held out documents") < boundary
        for line in _lines(document):
            characters += len(line)
            if is_held_out:
                held_out.add(line)
            else:
                train_bytes += len(line.encode())
                train.add(line)
    return Corpus(
        lines=train.lines(),
        held_out=held_out.lines(),
        documents=count,
        characters=characters,
        is_sampled=train_bytes > train.bytes,
    )


def _hash(content: bytes, key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=_HASH_BYTES, key=key).digest(), "big")


def _lines(document: str) -> Iterator[str]:
    for line in document.splitlines():
        if line.strip():
            yield from (line[start : start + MAX_LINE] for start in range(0, len(line), MAX_LINE))


def _texts(path: Path, field: str, bad: BadSamples, on_read: Callable[[int], None]) -> Iterator[str]:
    for item in read_texts(path, "line", on_read, field=field):
        if isinstance(item, BadText):
            bad.add(item.place, item.reason)
        else:
            yield item[1]


def _captions(part: Part, bad: BadSamples) -> Iterator[str]:
    listing = listing_of(part)
    for first in range(0, len(listing), _AT_ONCE):
        for entry in listing.entries(first, first + _AT_ONCE):
            if isinstance(entry, Fault):
                bad.add(entry.source, entry.reason)
                continue
            try:
                yield from entry.captions()
            except MediaError as error:
                bad.add(entry.source, str(error))

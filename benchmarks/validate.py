"""How fast a dataset is held against the grammar: `python benchmarks/validate.py`.

Writes datasets of random ids in Emu3's vocabulary (texts; 512 x 512 pictures with captions; small pictures; both
kinds) and times, in one process and from the page cache: `inspect_data.py --validate` without its hashes, on one
thread and on `--workers`; the same documents one by one through the grammar; counting ids by kind; sha256 of the file,
which validating takes beside. Prints a table and writes JSON.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.config import load, run_program
from megatron_ext.data import DocumentDataset, DocumentWriter
from megatron_ext.data.survey import count_ids, default_workers, judge
from megatron_ext.vocab import Grammar, Image, QwenTokenizer, Segment, Text, VocabLayout, Vocabulary

MIXES = {"texts": (0.0, 64), "pictures of 64 x 64": (1.0, 64), "pictures of 16 x 16": (1.0, 16), "mixed": (0.2, 64)}
"""Name -> (share of documents with a picture, codes of a side of its square)."""

ONE_BY_ONE_IDS = 1 << 21


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time validation."""

    ids: int = 64_000_000
    """Ids of each dataset, about."""

    workers: int | None = None
    """Threads of the parallel row; empty takes one per core."""

    output: str = "runs/benchmarks/validate.json"
    """Where the figures go."""


def write(prefix: Path, vocabulary: Vocabulary, share: float, side: int, ids: int) -> None:
    """A dataset of random documents."""
    rng = np.random.default_rng(0)
    with DocumentWriter(prefix, vocabulary, "0" * 16) as writer:
        written = 0
        while written < ids:
            segments: list[Segment] = [Text(rng.integers(0, 150_000, 1 + int(rng.lognormal(4 if share == 1 else 6.3))))]
            if rng.random() < share:
                height = int(rng.integers(side * 3 // 4, side * 5 // 4))
                codes = rng.integers(0, vocabulary.layout.codebook_size, (height, side * side // height))
                segments.append(Image(codes))
            written += writer.add(segments, str(len(writer)))
        writer.commit()


def rate(ids: int, function: Callable[[], object], repeats: int = 3) -> float:
    """Million ids per second of the fastest call."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return ids / min(seconds) / 1e6


def measure(prefix: Path, vocabulary: Vocabulary, workers: int) -> dict[str, float]:
    """A row of the table."""
    dataset = DocumentDataset(prefix, vocabulary)
    grammar = Grammar(vocabulary)
    first = int(np.searchsorted(np.cumsum(dataset.lengths, dtype=np.int64), ONE_BY_ONE_IDS)) + 1
    first = min(first, len(dataset))
    few = int(dataset.lengths[:first].sum(dtype=np.int64))
    ids = dataset.manifest.num_ids

    def judged(threads: int) -> None:
        assert judge(dataset, threads, lambda count: None).wrong == 0

    return {
        "documents": len(dataset),
        "ids": ids,
        "one_thread": rate(ids, lambda: judged(1)),
        "threads": rate(ids, lambda: judged(workers)),
        "one_by_one": rate(few, lambda: [grammar.validate(dataset.ids(number)) for number in range(first)], 1),
        "counting": rate(ids, lambda: count_ids(dataset, 1, lambda count: None)),
        "sha256": rate(
            ids, lambda: hashlib.file_digest(prefix.with_name(prefix.name + ".bin").open("rb"), "sha256"), 1
        ),
    }


def main(argv: list[str]) -> None:
    """Measure every mix."""
    config = load(BenchmarkConfig, argv, prog="validate")
    workers = config.workers or default_workers()
    vocabulary = Vocabulary(VocabLayout.emu3(), QwenTokenizer())
    figures = {}
    print(f"million ids/s      1 thread  {workers} threads  one by one  counting  sha256")
    for name, (share, side) in MIXES.items():
        with tempfile.TemporaryDirectory() as folder:
            prefix = Path(folder) / "set"
            write(prefix, vocabulary, share, side, config.ids)
            row = figures[name] = measure(prefix, vocabulary, workers)
        print(
            f"{name:<19}{row['one_thread']:>8.0f}{row['threads']:>11.0f}{row['one_by_one']:>12.1f}"
            f"{row['counting']:>10.0f}{row['sha256']:>8.0f}", flush=True,
        )  # fmt: skip
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run_program(main)

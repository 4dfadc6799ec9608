"""Feeding the trainer: `python benchmarks/data_loader.py`.

Tokens per second that 1 to 4 processes ("workers": a data rank each, as in training) get as batches from documents on
disk, at the window lengths of Emu3's two stages, with the files in the page cache and dropped from it; beside a copy of
the same bytes in memory, and beside Megatron's GPTDataset on the same files. Every window is read once. Then how long
the packed index takes to build and to open. Prints a table and writes JSON; `--folder` keeps the documents.
"""

import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from document_mixes import MIXES, Mix, draw
from megatron_dataset import open_gpt_dataset
from rich.console import Console

from megatron_ext.config import load, run_program
from megatron_ext.config.data import DataConfig, DatasetConfig
from megatron_ext.config.train import TrainConfig
from megatron_ext.config.vocab import VocabConfig
from megatron_ext.data import DocumentDataset, DocumentWriter, Loader, PackedDataset, PackingRules, build_data
from megatron_ext.data.step_windows import DataRank
from megatron_ext.observe.progress import progress
from megatron_ext.vocab import Image, Text, Video, Vocabulary

FORK = multiprocessing.get_context("fork")
MIX_NAMES = ("stage 1, even", "stage 2, even")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time the loader."""

    folder: str = "runs/benchmarks/data_loader"
    """Where the documents are, or are written."""

    million_ids: int = 128
    """Ids of the documents of each stage; 4 bytes each."""

    workers: tuple[int, ...] = (1, 2, 3, 4)
    """Numbers of processes."""

    repeats: int = 3
    """The median of so many measurements counts."""

    output: str = "runs/benchmarks/data_loader.json"
    """Where the figures go."""


def write_documents(prefix: Path, mix: Mix, ids: int, vocabulary: Vocabulary) -> None:
    """Random documents with the lengths of the mix."""
    rng = np.random.default_rng(0)
    low, high = vocabulary.text_ranges[-1]
    codes = vocabulary.layout.codebook_size
    written = 0
    drawn = draw(mix, ids // 500, seed=0)
    with DocumentWriter(prefix, vocabulary, "random") as writer, progress("write", ids, "ids", Console()) as advance:
        for number, (length, caption, frames) in enumerate(
            zip(drawn.lengths.tolist(), drawn.captions.tolist(), drawn.frames.tolist(), strict=True)
        ):
            text = Text(rng.integers(low, high, size=caption if frames else length - 2))
            media = rng.integers(0, codes, size=(max(1, frames), 64, 64))
            segments = {0: [text], 1: [text, Image(media[0])]}.get(frames, [text, Video(media, 24_000, 167 * frames)])
            size = writer.add(segments, f"random/{number}")
            advance(size)
            written += size
            if written >= ids:
                break
        writer.commit()


def drop_from_cache(folder: Path) -> None:
    """Drop the pages of all files from the page cache; no process may have them mapped."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_into_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()


def loader_of(prefix: Path, mix: Mix, vocabulary: Vocabulary, rank: int, workers: int) -> Loader:
    data = DataConfig(train=(DatasetConfig(prefix=str(prefix)),), document_alignment=8)
    train = TrainConfig(seq_length=mix.seq_length, micro_batch_size=1, global_batch_size=workers, train_steps=1, seed=0)
    return build_data(data, train, vocabulary, DataRank(rank, workers)).train


def read_ours(prefix: Path, mix: Mix, vocabulary: Vocabulary, rank: int, workers: int) -> Callable[[], int]:
    """What a worker does: batches of its share of the windows; returns their tokens."""
    loader = loader_of(prefix, mix, vocabulary, rank, workers)
    steps = len(loader.datasets[0]) // workers

    def read() -> int:
        return sum(batch.tokens_BT.numel() for step in range(steps) for batch in loader.microbatches(step * workers))

    return read


def read_megatron(prefix: Path, mix: Mix, vocabulary: Vocabulary, rank: int, workers: int) -> Callable[[], int]:
    """The same for GPTDataset's samples."""
    dataset = open_gpt_dataset(prefix, mix.seq_length)
    return lambda: sum(dataset[index]["tokens"].numel() for index in range(rank, len(dataset), workers))


def read_plain(prefix: Path, mix: Mix, vocabulary: Vocabulary, rank: int, workers: int) -> Callable[[], int]:
    """A copy of the same bytes, window by window, from the page cache into one buffer."""
    ids = np.memmap(f"{prefix}.bin", dtype=np.int32, mode="r")
    windows = len(ids) // mix.seq_length
    buffer = np.empty(mix.seq_length, dtype=np.int32)

    def read() -> int:
        mine = range(rank, windows, workers)
        for window in mine:
            np.copyto(buffer, ids[window * mix.seq_length : (window + 1) * mix.seq_length])
        return len(mine) * mix.seq_length

    return read


def worker(make: Callable, arguments: tuple, barrier, results) -> None:
    read = make(*arguments)
    barrier.wait()
    started = time.monotonic()
    tokens = read()
    results.put((tokens, started, time.monotonic()))


def tokens_per_second(make: Callable, arguments: tuple, workers: int) -> float:
    """Of all workers together, from the start of the first to the end of the last."""
    barrier, results = FORK.Barrier(workers), FORK.Queue()
    processes = [
        FORK.Process(target=worker, args=(make, (*arguments, rank, workers), barrier, results))
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return sum(tokens for tokens, _, _ in found) / (max(end for *_, end in found) - min(start for _, start, _ in found))


def measure(prefix: Path, mix: Mix, vocabulary: Vocabulary, config: BenchmarkConfig) -> dict:
    """All figures of one stage, in million tokens per second; measurements of the readers alternate."""
    arguments = (prefix, mix, vocabulary)
    readers = {"ours": read_ours, "megatron": read_megatron, "copy": read_plain}
    found: dict[str, list[float]] = {}
    for _ in range(config.repeats):
        for workers in config.workers:
            for name, make in readers.items():
                for state, prepare in (("cold", drop_from_cache), ("warm", read_into_cache)):
                    prepare(prefix.parent)
                    rate = tokens_per_second(make, arguments, workers)
                    found.setdefault(f"{name}, {workers} workers, {state}", []).append(rate / 1e6)
    return {name: float(np.median(rates)) for name, rates in found.items()} | {"spread": found}


def measure_index(prefix: Path, mix: Mix, vocabulary: Vocabulary, cache: Path) -> dict:
    """Milliseconds to open a dataset, the packed index absent and present."""
    rules = PackingRules(seq_length=mix.seq_length, alignment=8)

    def open_once() -> float:
        started = time.perf_counter()
        PackedDataset(prefix, vocabulary, rules, str(cache))
        return 1000 * (time.perf_counter() - started)

    return {"build_ms": open_once(), "open_ms": float(np.median([open_once() for _ in range(20)]))}


def main(argv: list[str]) -> None:
    config = load(BenchmarkConfig, argv, prog="data_loader")
    logging.disable(logging.WARNING)  # megatron-core tells every index that it builds
    torch.set_num_threads(1)
    vocabulary = Vocabulary.load(VocabConfig())
    rows = []
    for mix in (mix for mix in MIXES if mix.name in MIX_NAMES):
        folder = Path(config.folder) / f"{mix.name.replace(', ', '_').replace(' ', '')}_{config.million_ids}m"
        prefix = folder / "documents"
        if not Path(f"{prefix}.idx").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_documents(prefix, mix, config.million_ids * 1_000_000, vocabulary)
        index = measure_index(prefix, mix, vocabulary, folder / f"fresh_{time.time_ns()}")
        loader_of(prefix, mix, vocabulary, 0, 1)  # its index is built before anything is timed
        documents = len(DocumentDataset.open(prefix))
        rows.append(
            {"mix": mix.name, "seq_length": mix.seq_length, "documents": documents, **index}
            | measure(prefix, mix, vocabulary, config)
        )
        row = rows[-1]
        print(f"{mix.name}, windows of {mix.seq_length:,}; {documents:,} documents; million tokens per second")
        print(
            f"  {'workers':<10}{'ours warm':>11}{'cold':>9}{'Megatron warm':>15}{'cold':>9}{'copy warm':>11}{'cold':>9}"
        )
        for workers in config.workers:
            columns = [
                f"{row[f'{name}, {workers} workers, {state}']:{width}.1f}"
                for name, width in (("ours", 11), ("megatron", 15), ("copy", 11))
                for state, width in (("warm", width), ("cold", 9))
            ]
            print(f"  {workers:<10}{''.join(columns)}")
        print(f"  packed index built in {row['build_ms']:.0f} ms, opened in {row['open_ms']:.1f} ms", flush=True)
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    run_program(main)

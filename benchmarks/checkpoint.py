"""What a checkpoint costs a training: `python benchmarks/checkpoint.py`.

One decoder trains on random windows; it saves with and without `checkpoint.async_save`, in turns. Measured: how long
training stands still, how much slower steps are while a writer works, seconds until the checkpoint is whole, bytes a
second beside what the disk gives a plain file of the same size (written and forced to disk), and the peak of the
process and its writer above the memory between saves. Prints a table and writes JSON.
"""

import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from megatron_ext.checkpoint.decoder import DecoderCheckpoint
from megatron_ext.config import InputError, load, run_program
from megatron_ext.config.checkpoint import CheckpointConfig
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.objective import ObjectiveConfig
from megatron_ext.config.optim import OptimConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.data.batch import collate
from megatron_ext.data.windows import Window
from megatron_ext.model import build_model
from megatron_ext.objectives import build_objective
from megatron_ext.optim import build_optimizer
from megatron_ext.runtime import Topology
from megatron_ext.train import MicrobatchRunner
from megatron_ext.vocab import Vocabulary
from megatron_ext.vocab.text import QwenTokenizer
from megatron_ext.vocab.vocabulary import VocabLayout

SAMPLES_A_SECOND = 50


@dataclass(frozen=True, kw_only=True)
class CheckpointBenchmarkConfig:
    """What a checkpoint costs a training, in the background and not."""

    hidden_size: int = 256
    """Width of the decoder; with Emu3's vocabulary 256 make 0.1 billion weights, 1.2 GB of state in fp32."""

    num_layers: int = 2
    """Its layers."""

    seq_length: int = 256
    """Ids of a step: short steps show what a writer takes from them."""

    saves: int = 3
    """Checkpoints in each way."""

    steps_between: int = 6
    """Steps without a writer before each save, for comparison."""

    threads: int = 2
    """CPU threads."""

    folder: str | None = None
    """Where the checkpoints go, and are removed; null takes the system's temporary folder."""

    output: str = "runs/benchmarks/checkpoint.json"
    """Where the figures go."""


class Subject:
    """A decoder in training and its checkpoints."""

    def __init__(self, config: CheckpointBenchmarkConfig, folder: Path, topology: Topology) -> None:
        vocab = Vocabulary(VocabLayout.emu3(), QwenTokenizer())
        section = ModelConfig(preset="tiny", hidden_size=config.hidden_size, num_layers=config.num_layers)
        model = build_model(section, ParallelConfig(), vocab.layout, topology, seed=1)
        self.optimizer = build_optimizer(OptimConfig(), ParallelConfig(), model, topology, steps=1000)
        self.runner = MicrobatchRunner(
            self.optimizer.model, build_objective(ObjectiveConfig(), vocab.layout), topology, seed=1
        )
        ids = np.random.default_rng(0).integers(0, vocab.layout.size, config.seq_length)
        mask = np.arange(config.seq_length) < config.seq_length - 1
        window = Window(ids=ids, labels=np.roll(ids, -1), mask=mask, boundaries=np.array([0, config.seq_length]))
        self._batch = collate([window], [0], "document")
        self._steps = 0
        self.checkpoints = {
            way: DecoderCheckpoint(
                CheckpointConfig(async_save=way == "background", keep=1),
                folder / way, self.optimizer, topology, vocab, {}, "{}\n",
            )
            for way in ("background", "waiting")
        }  # fmt: skip

    def step(self) -> float:
        """Seconds of one optimizer step."""
        began = time.perf_counter()
        self.optimizer.zero_grad()
        self.runner.run([self._batch], ("random",), step=self._steps)
        self._steps += 1
        self.optimizer.step(self._steps)
        return time.perf_counter() - began

    def save(self, way: str) -> dict[str, float]:
        """Save once, stepping on while a writer works; figures of this save."""
        checkpoint, slowed = self.checkpoints[way], []
        with peak_above_now() as peak:
            checkpoint.start_save(self._steps, {})
            while (outcome := checkpoint.poll()) is None:
                slowed.append(self.step())
        if outcome.folder is None:
            raise InputError(f"folder: the checkpoint was not saved ({outcome.failure}): give a disk with room")
        written = sum(path.stat().st_size for path in outcome.folder.rglob("*") if path.is_file())
        found = {"blocked_s": outcome.blocked_seconds, "whole_after_s": outcome.seconds, "bytes": written}
        if len(slowed) > 1:  # the last one may have ended after the writer
            found["slowed_step_s"] = statistics.median(slowed[:-1])
        return found | {"peak_gib": peak() / 2**30}


@contextmanager
def peak_above_now() -> Iterator[Callable[[], float]]:
    """The most memory (bytes, shared pages counted by share) of this process and its children above what it has now."""

    def used() -> float:
        total = 0.0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:  # the writer has just ended
                continue
        return total

    before, seen, done = used(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(1 / SAMPLES_A_SECOND):
            seen.append(used() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: max(seen)
    finally:
        done.set()
        watcher.join()


def disk_rate(folder: Path, size: int) -> float:
    """Bytes a second of a plain file of `size` bytes, written and forced to disk."""
    path, chunk = folder / "plain", np.random.default_rng(0).bytes(1 << 24)
    began = time.perf_counter()
    with path.open("wb") as file:
        for first in range(0, size, len(chunk)):
            file.write(chunk[: size - first])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return size / seconds


def measure(config: CheckpointBenchmarkConfig, folder: Path, topology: Topology) -> dict[str, dict[str, float]]:
    """Way -> median figures over its saves; `alone`: a step without a writer, the disk by itself."""
    subject = Subject(config, folder, topology)
    subject.step()
    alone, found, rates = [], {"background": [], "waiting": []}, []
    for _ in range(config.saves):
        for way, figures in found.items():
            alone += [subject.step() for _ in range(config.steps_between)]
            figures.append(subject.save(way))
            rates.append(disk_rate(folder, figures[-1]["bytes"]))
    result = {
        way: {
            name: statistics.median(save[name] for save in saves if name in save)
            for name in sorted({name for save in saves for name in save})
        }
        for way, saves in found.items()
    }
    return result | {"alone": {"step_s": statistics.median(alone), "disk_bytes_s": statistics.median(rates)}}


def main(argv: list[str]) -> None:
    """Measure, print, write."""
    config = load(CheckpointBenchmarkConfig, argv, prog="checkpoint")
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=config.folder))
    try:
        with Topology.start(RuntimeConfig(device="cpu", num_threads=config.threads), ParallelConfig()) as topology:
            found = measure(config, folder, topology)
    finally:
        shutil.rmtree(folder)
    alone = found["alone"]
    print(f"a step {alone['step_s']:.3f} s; the disk alone {alone['disk_bytes_s'] / 1e6:,.0f} MB/s")
    for way in ("waiting", "background"):
        figures = found[way]
        slowed = figures.get("slowed_step_s")
        print(
            f"{way}: training stands still {figures['blocked_s']:.3f} s; whole after {figures['whole_after_s']:.2f} s "
            f"({figures['bytes'] / 1e9:.2f} GB, {figures['bytes'] / figures['whole_after_s'] / 1e6:,.0f} MB/s)"
            + (f"; steps meanwhile {slowed:.3f} s" if slowed else "")
            + f"; peak {figures['peak_gib']:.2f} GiB more"
        )
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"torch": torch.__version__, "threads": config.threads, **found}, indent=2) + "\n")


if __name__ == "__main__":
    run_program(main)

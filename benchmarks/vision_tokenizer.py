"""The vision tokenizer against transformers' Emu3VQVAE: `python benchmarks/vision_tokenizer.py`.

Emu3's full architecture (270M weights, random, the same on both sides), each side in a process of its own, one pair of
calls after the other, the side that begins alternating. Every call's time and its peak of memory above weights are
kept, so that speed and memory come from the same calls; codes and pixels of the two are compared in every pair. On a
CPU the peak is that of the resident set (VmHWM) above the resident set before the call, on a GPU that of the allocator.

Pairs are added to the output file as they are made, until each case has `pairs` of them: after `minutes`, or an
interruption, the same command goes on. Prints a table of medians and spreads.
"""

import ctypes
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_ext.config import InputError, load, run_program
from megatron_ext.config.runtime import DeviceName, RuntimeConfig
from megatron_ext.files import replacing
from megatron_ext.runtime.device import (
    PRECISIONS,
    choose_device,
    memory_used,
    peak_memory_bytes,
    reset_peak_memory,
    synchronize,
)
from megatron_ext.vision import MoVQGAN, VisionTokenizerConfig

SIDES = ("ours", "theirs")
WORKS = ("encode", "decode")
CASES = {
    "still_256": (1, 3, 256, 256),
    "still_256_batch4": (4, 3, 256, 256),
    "still_512": (1, 3, 512, 512),
    "clip_256": (1, 4, 3, 256, 256),
    "still_512_batch8": (8, 3, 512, 512),
    "still_720_batch4": (4, 3, 720, 720),
    "clip_512": (1, 16, 3, 512, 512),
}
"""Shapes of the pixels: [B, C, H, W] of stills, [B, T, C, H, W] of clips."""
CPU_CASES = ("still_256", "still_256_batch4", "still_512", "clip_256")
GPU_CASES = tuple(CASES)


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time and memory of encoding and decoding, against transformers' Emu3VQVAE with the same weights."""

    cases: tuple[str, ...] = ()
    """Names of shapes to measure; none takes those that the device can do in reasonable time."""

    pairs: int = 3
    """Pairs of calls of each case to have in the end."""

    minutes: float = 8.0
    """No pair is begun that would, by the time its case took before, end later than this."""

    ch: int = 256
    """Width of the finest stage; 256 is Emu3's, less tries the program out."""

    device: DeviceName = "auto"
    """Where to compute; auto takes CUDA when a GPU is visible."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of weights and maps."""

    threads: int = 2
    """CPU threads of each side; the other side waits meanwhile."""

    output: str = "runs/benchmarks/vision_tokenizer.json"
    """Where the figures go."""

    def __post_init__(self) -> None:
        if unknown := set(self.cases) - set(CASES):
            raise InputError(f"cases {sorted(unknown)}: must be of {', '.join(CASES)}")
        if self.pairs < 1 or self.minutes <= 0:
            raise InputError(f"pairs = {self.pairs}, minutes = {self.minutes}: both must be positive")

    @property
    def settings(self) -> dict[str, Any]:
        """What a figure depends on beside its case."""
        device = choose_device(RuntimeConfig(device=self.device), 0).type
        return {
            "device": device, "precision": self.precision, "threads": self.threads, "ch": self.ch,
            "torch": torch.__version__,
        }  # fmt: skip


class Ours:
    """This project's tokenizer, its codebook as wide as its latents and its pixels of order one."""

    def __init__(self, ch: int) -> None:
        torch.manual_seed(0)
        self.model = MoVQGAN(VisionTokenizerConfig(ch=ch)).eval()
        with torch.no_grad():
            latents = self.model.latents(torch.rand(1, 3, 64, 64) * 2 - 1)
            self.model.quantize.embedding.weight.normal_().mul_(latents.std()).add_(latents.mean())
            codes = torch.randint(0, len(self.model.quantize.embedding.weight), (1, 2, 8, 8))
            self.model.decoder.conv_out.weight.mul_(0.5 / self.model.decode(codes).std())

    def encode(self, pixels: Tensor) -> Tensor:
        return self.model.encode(pixels)

    def decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes)


class Theirs:
    """transformers' class as its users call it."""

    def __init__(self, ch: int) -> None:
        from transformers import Emu3VQVAE, Emu3VQVAEConfig

        from megatron_ext.hf import vision_tensors
        from megatron_ext.hf.vision import vq_config

        ours = Ours(ch).model
        self.model = Emu3VQVAE(Emu3VQVAEConfig(**vq_config(ours.config))).eval()
        self.model.load_state_dict({name: tensor.whole() for name, tensor in vision_tensors(ours)})

    def encode(self, pixels: Tensor) -> Tensor:
        sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
        return torch.stack(self.model.encode(pixels, sizes).image_tokens)

    def decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes)


def release_memory() -> None:
    """Give freed memory back to the system, or the resident set would count it as in use."""
    ctypes.CDLL(None).malloc_trim(0)


@torch.inference_mode()
def serve(side: str, connection: Connection, config: BenchmarkConfig) -> None:
    """Answer (work, array) with (seconds, bytes above weights, result) until None comes."""
    device = choose_device(RuntimeConfig(device=config.device), 0)
    torch.set_num_threads(config.threads)
    built = {"ours": Ours, "theirs": Theirs}[side](config.ch)
    built.model.to(device, PRECISIONS[config.precision])
    pixels = torch.zeros(1, 3, 64, 64, device=device, dtype=PRECISIONS[config.precision])
    built.decode(built.encode(pixels))  # libraries and thread pools
    connection.send("ready")
    while (request := connection.recv()) is not None:
        work, array = request
        given = torch.from_numpy(array).to(device)
        given = given.to(PRECISIONS[config.precision]) if given.is_floating_point() else given
        release_memory()
        reset_peak_memory(device)
        before = memory_used(device)
        synchronize(device)
        started = time.perf_counter()
        result = getattr(built, work)(given)
        synchronize(device)
        seconds = time.perf_counter() - started
        above = peak_memory_bytes(device) - before
        connection.send((seconds, above, (result.float() if work == "decode" else result).cpu().numpy()))


class Pair:
    """Both sides, each in its own process."""

    def __init__(self, config: BenchmarkConfig) -> None:
        context = multiprocessing.get_context("spawn")
        self.ends: dict[str, Connection] = {}
        self.processes = []
        for side in SIDES:
            self.ends[side], theirs = context.Pipe()
            self.processes.append(context.Process(target=serve, args=(side, theirs, config), daemon=True))
            self.processes[-1].start()
            theirs.close()  # so that the death of the process is seen here
            self.ends[side].recv()

    def call(self, side: str, work: str, array: np.ndarray) -> tuple[float, int, np.ndarray]:
        self.ends[side].send((work, array))
        return self.ends[side].recv()

    def measure(self, shape: tuple[int, ...], index: int) -> dict[str, Any]:
        """One pair of calls of each work."""
        random = np.random.default_rng(index)
        given = random.uniform(-1, 1, shape).astype(np.float32)
        record: dict[str, Any] = {}
        for work in WORKS:
            results = {}
            for side in SIDES if index % 2 == 0 else reversed(SIDES):
                seconds, above, results[side] = self.call(side, work, given)
                record |= {f"{work}_{side}_s": seconds, f"{work}_{side}_bytes": above}
            if work == "encode":
                given = results["ours"]
                record["codes"] = int(given.size)
                record["codes_used"] = len(np.unique(given))
                record["codes_that_differ"] = int((given != results["theirs"]).sum())
            else:
                record["pixel_difference"] = float(np.abs(results["ours"] - results["theirs"]).max())
                record["pixel_largest"] = float(np.abs(results["theirs"]).max())
        return record

    def close(self) -> None:
        for end in self.ends.values():
            end.send(None)
        for process in self.processes:
            process.join(timeout=30)


def ratios(records: list[dict], works: tuple[str, ...], unit: str) -> list[float]:
    """theirs / ours (or, for bytes, ours / theirs: the larger of the works' peaks) of every pair, sorted."""
    found = []
    for record in records:
        ours, theirs = ([record[f"{work}_{side}_{unit}"] for work in works] for side in SIDES)
        found.append(sum(theirs) / sum(ours) if unit == "s" else max(ours) / max(theirs))
    return sorted(found)


def summary(records: list[dict]) -> dict[str, Any]:
    """Medians and spreads of a case."""
    result: dict[str, Any] = {"pairs": len(records)}
    for name in ("codes_that_differ", "pixel_difference"):
        result[name] = max(record[name] for record in records)
    for label, works in {"encode": ("encode",), "decode": ("decode",), "both": WORKS}.items():
        for side in SIDES:
            times = [sum(record[f"{work}_{side}_s"] for work in works) for record in records]
            peaks = [max(record[f"{work}_{side}_bytes"] for work in works) for record in records]
            result |= {f"{label}_{side}_s": statistics.median(times), f"{label}_{side}_bytes": statistics.median(peaks)}
        for name, unit in (("speed", "s"), ("memory", "bytes")):
            values = ratios(records, works, unit)
            result[f"{label}_{name}_ratio"] = [statistics.median(values), values[0], values[-1]]
    return result


def table(found: dict[str, dict[str, Any]], settings: dict[str, Any]) -> Table:
    """A row of each case and work; ratios as median (lowest to highest)."""
    title = ", ".join(f"{name} {value}" for name, value in settings.items())
    result = Table("case", "work", "pairs", "ours s", "transformers s", "times as fast", title=title)
    for column in ("ours GiB", "transformers GiB", "share", "codes differ", "pixels differ"):
        result.add_column(column)
    for case, row in found.items():
        for label in ("encode", "decode", "both"):
            speed, memory = row[f"{label}_speed_ratio"], row[f"{label}_memory_ratio"]
            cells = [f"{row[f'{label}_{side}_s']:.3f}" for side in SIDES]
            cells.append(f"{speed[0]:.2f} ({speed[1]:.2f} to {speed[2]:.2f})")
            cells += [f"{row[f'{label}_{side}_bytes'] / 2**30:.3f}" for side in SIDES]
            cells.append(f"{memory[0]:.3f} ({memory[1]:.3f} to {memory[2]:.3f})")
            cells += [str(row["codes_that_differ"]), f"{row['pixel_difference']:.1e}"]
            result.add_row(case, label, str(row["pairs"]), *cells)
    return result


def write(path: Path, runs: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")


def expected_seconds(records: dict[str, list[dict]], case: str) -> float:
    """What a pair of `case` took before, or, by the number of pixels, the slowest of the other cases; 0 at first."""
    known = {case: records[case]} if records[case] else records
    return max(
        (
            record["pair_seconds"] * math.prod(CASES[case]) / math.prod(CASES[name])
            for name, found in known.items()
            for record in found
        ),
        default=0.0,
    )


def fill(run: dict[str, Any], cases: tuple[str, ...], config: BenchmarkConfig, save: Callable[[], None]) -> bool:
    """Add pairs to `run` until every case has enough, the cases in turn; False when the time is up before."""
    started = time.monotonic()
    records: dict[str, list[dict]] = run["records"]
    wanted = [case for _ in range(config.pairs) for case in cases]
    for case in cases:
        for _ in records.setdefault(case, []):
            if case in wanted:
                wanted.remove(case)
    if not wanted:
        return True
    pair = Pair(config)
    try:
        for case in wanted:
            if time.monotonic() - started + expected_seconds(records, case) > 60 * config.minutes:
                return False
            began = time.monotonic()
            record = pair.measure(CASES[case], len(records[case]))
            records[case].append(record | {"pair_seconds": time.monotonic() - began})
            save()
    finally:
        pair.close()
    return True


def main(argv: list[str]) -> None:
    """Run the program with the arguments after its name."""
    config = load(BenchmarkConfig, argv, prog="vision_tokenizer")
    settings = config.settings
    cases = config.cases or (CPU_CASES if settings["device"] == "cpu" else GPU_CASES)
    path = Path(config.output)
    runs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    run = next((run for run in runs if run["settings"] == settings), None)
    if run is None:
        run = {"settings": settings, "records": {}}
        runs.append(run)
    complete = fill(run, tuple(cases), config, lambda: write(path, runs))
    run["summary"] = {case: summary(records) for case, records in run["records"].items() if records}
    write(path, runs)
    console = Console(highlight=False, width=None if Console().is_terminal else 180)
    console.print(table(run["summary"], settings))
    if not complete:
        console.print(f"{config.minutes:g} minutes are over: the same command goes on", soft_wrap=True)


if __name__ == "__main__":
    run_program(main)

"""Pictures per second from files to filter scores, and from files to codes: `python benchmarks/decode_filter.py`.

Beside two loops that anyone would write, in the same run: `cv2.imread` and `cv2.resize`, one picture after the other;
and Pillow, our resize and the tokenizer, one picture at a time. JPEGs are written from the inputs at a size of
photographs. Ours are the processes of curation (all measures that need no network: hashes of file and pixels,
perceptual hash, colour, and the square for CLIP) and of tokenization. Every row is timed in turn, `rounds` times; the
best is told, since others may use the machine; CPU time, of all processes together, says more where they do. Prints a
table and writes JSON, which preprocess_data.py --plan reads.
"""

import functools
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from media_loader import BenchmarkConfig as JpegConfig
from media_loader import write_jpegs

from megatron_ext.config import load, run_program
from megatron_ext.curate.picture_filters import PictureFiltersConfig
from megatron_ext.curate.pictures import measure
from megatron_ext.media import ResizeConfig, Sample, list_samples
from megatron_ext.media.decode import ClipConfig, DecodedSample, Decoder
from megatron_ext.media.workers import WorkerPool
from megatron_ext.vision import MoVQGAN, VisionTokenizerConfig, from_uint8
from megatron_ext.vision.tokenize import tokenize


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time decoding, filters and tokenization."""

    inputs: list[str] = field(default_factory=lambda: ["examples/media/images"])
    """Pictures that the JPEGs are made from."""

    pictures: int = 48
    """JPEGs."""

    height: int = 1200
    """Of a JPEG, in pixels."""

    width: int = 1600
    """Of a JPEG, in pixels."""

    size: int = 512
    """Side of the square whose area pictures are brought to."""

    channels: int = 32
    """Width of the tokenizer: Emu3's has 256, and nothing else than it would be seen on a CPU."""

    encoded: int = 8
    """JPEGs that are tokenized."""

    encoded_size: int = 256
    """Side of the square whose area these are brought to: encoding on a CPU takes longer than all the rest."""

    workers: list[int] = field(default_factory=lambda: [1, 2])
    """Numbers of decoding processes to try."""

    rounds: int = 3
    """How often every row is timed."""

    output: str = "runs/benchmarks/decode_filter.json"
    """Where the figures go."""


def plain_loop(samples: list[Sample], config: BenchmarkConfig) -> None:
    """OpenCV, to the same sizes."""
    for sample in samples:
        picture = cv2.imread(str(sample.media.path), cv2.IMREAD_COLOR_RGB)
        scale = config.size / (picture.shape[0] * picture.shape[1]) ** 0.5
        sides = tuple(round(side * scale / 8) * 8 for side in picture.shape[1::-1])
        cv2.resize(picture, sides, interpolation=cv2.INTER_AREA)


def one_at_a_time(samples: list[Sample], decoder: Decoder, model: MoVQGAN) -> np.ndarray:
    """Codes of each picture, decoded and encoded by itself."""
    codes = []
    for sample in samples:
        with torch.inference_mode():
            codes.append(model.encode(from_uint8(decoder(sample).frames)[None])[0].numpy())
    return np.stack(codes)


def in_batches(samples: list[Sample], pool: WorkerPool[Sample, DecodedSample], model: MoVQGAN) -> np.ndarray:
    """Codes as tokenize_vision.py makes them."""
    return np.stack([found.codes for found in tokenize(pool.map(samples), model, batch_size=8, advance=lambda _: None)])


@dataclass(frozen=True)
class Row:
    """One thing to time."""

    count: int
    """Pictures."""
    run: Callable[[], object]
    pool: WorkerPool | None = None
    """The processes that work for it."""


def measured(rows: dict[str, Row], rounds: int) -> dict[str, dict[str, float]]:
    """The best pictures per second and the least milliseconds of CPU time per picture of each row, the rows in turn."""
    found = {name: {"pictures_per_second": 0.0, "cpu_milliseconds": float("inf")} for name in rows}
    for _ in range(rounds):
        for name, row in rows.items():
            cpu, started = cpu_seconds(row.pool), time.perf_counter()
            row.run()
            seconds, spent = time.perf_counter() - started, cpu_seconds(row.pool) - cpu
            best = found[name]
            best["pictures_per_second"] = max(best["pictures_per_second"], row.count / seconds)
            best["cpu_milliseconds"] = min(best["cpu_milliseconds"], 1000 * spent / row.count)
    return found


def cpu_seconds(pool: WorkerPool | None) -> float:
    """That this process and those of `pool` have used (proc(5), /proc/pid/stat, fields 14 and 15)."""
    ticks = 0
    for pid in pool.process_ids if pool else ():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def main(argv: list[str]) -> None:
    """Run the program with the arguments after its name."""
    config = load(BenchmarkConfig, argv, prog="benchmarks/decode_filter.py")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cv2.setNumThreads(1)
    model = MoVQGAN(VisionTokenizerConfig(ch=config.channels, codebook_size=4096)).eval()
    with torch.no_grad():
        latents = model.latents(torch.rand(1, 3, 64, 64) * 2 - 1)
        model.quantize.embedding.weight.normal_().mul_(latents.std()).add_(latents.mean())
    decoder, small = (
        Decoder(resize=ResizeConfig(rule="target", size=size), clips=ClipConfig(), spatial_factor=8, temporal_factor=4)
        for size in (config.size, config.encoded_size)
    )
    with tempfile.TemporaryDirectory() as name:
        jpegs = JpegConfig(inputs=config.inputs, pictures=config.pictures, height=config.height, width=config.width)
        write_jpegs(jpegs, Path(name))
        samples = list_samples([name])
        few = samples[: config.encoded]
        rows = {
            "plain loop: cv2.imread, cv2.resize": Row(len(samples), lambda: plain_loop(samples, config)),
            "tokenized one at a time": Row(len(few), lambda: one_at_a_time(few, small, model)),
        }
        pools = []
        filters = functools.partial(measure, filters=PictureFiltersConfig(), clip_side=224)
        for count in config.workers:
            for what, function in {"decode + resize": decoder, "decode + resize + filters": filters}.items():
                pools.append(pool := WorkerPool(function, count))
                rows[f"{what}, {count} processes"] = Row(len(samples), lambda pool=pool: list(pool.map(samples)), pool)
            pools.append(pool := WorkerPool(small, count))
            rows[f"tokenized in batches, {count} + 1 processes"] = Row(
                len(few), lambda pool=pool: in_batches(few, pool, model), pool
            )
        alike = one_at_a_time(few, small, model) == in_batches(few, pools[-1], model)
        found = measured(rows, config.rounds)
        for pool in pools:
            pool.__exit__()
    print(f"{config.height}x{config.width} JPEGs to the area of {config.size}x{config.size}, best of {config.rounds}")
    print(f"{'':44}{'pictures/s':>12}{'CPU ms/picture':>16}")
    for name, row in found.items():
        print(f"{name:44}{row['pictures_per_second']:12.1f}{row['cpu_milliseconds']:16.0f}")
    print(f"codes that batches change: {int((~alike).sum())} of {alike.size}")
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    alone = found[f"decode + resize + filters, {config.workers[0]} processes"]
    rate = {"filter_pictures_per_second": 1000 / alone["cpu_milliseconds"]}
    output.write_text(json.dumps(rate | found, indent=1) + "\n")


def cli() -> None:
    """Entry from a shell."""
    run_program(main)


if __name__ == "__main__":
    cli()

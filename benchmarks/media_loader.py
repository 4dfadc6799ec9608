"""Pictures per second of the tokenizer's training, beside a plain OpenCV loop: `python benchmarks/media_loader.py`.

JPEGs are written from the inputs at a size of photographs. The plain loop decodes, crops and shrinks each with OpenCV
and makes a tensor, in one thread, one after the other. Ours are the training's own batches: order, crops, decoding in
the background. The last figure is the share of a training's time that it waits for pictures, when a step
computes for --step_seconds. Prints a table and writes JSON.
"""

import io
import json
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from megatron_ext.config import load, run_program
from megatron_ext.media import decode_picture, list_samples
from megatron_ext.vision import from_uint8
from tokenizer_train.vision.config_media import MediaConfig
from tokenizer_train.vision.data import TrainingMedia


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time the media loaders."""

    inputs: list[str] = field(default_factory=lambda: ["examples/media/images"])
    """Pictures that the JPEGs are made from."""

    pictures: int = 96
    """JPEGs."""

    height: int = 640
    """Of a JPEG, in pixels."""

    width: int = 900
    """Of a JPEG, in pixels."""

    size: int = 256
    """Side of the training squares in pixels."""

    batches: int = 24
    """Batches of 8 that are timed."""

    workers: list[int] = field(default_factory=lambda: [1, 2])
    """Numbers of decoding threads to try."""

    loaders: list[str] = field(default_factory=lambda: ["cpu", "dali"])
    """Loaders to try."""

    step_seconds: float = 0.2
    """Time that a training step computes, for the share of waiting."""

    output: str = "runs/benchmarks/media_loader.json"
    """Where the figures go."""


BATCH = 8


def write_jpegs(config: BenchmarkConfig, folder: Path) -> None:
    """Enlarged pictures with some noise, so that a file has the bytes of a photograph of its size."""
    sources = [sample for sample in list_samples(config.inputs) if sample.kind == "image"]
    random = np.random.default_rng(0)
    for number in range(config.pictures):
        picture = Image.fromarray(decode_picture(sources[number % len(sources)].media.read()))
        large = np.asarray(picture.resize((config.width, config.height), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(large + random.integers(-6, 7, large.shape), 0, 255).astype(np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(noisy).save(encoded, "JPEG", quality=85)
        (folder / f"{number:05d}.jpg").write_bytes(encoded.getvalue())


def plain_loop(config: BenchmarkConfig, folder: Path) -> float:
    """Pictures per second of a loop that anyone would write."""
    cv2.setNumThreads(1)
    random = np.random.default_rng(0)
    paths = sorted(folder.iterdir())
    started = time.perf_counter()
    for number in range(config.batches):
        batch = []
        for place in range(BATCH):
            picture = cv2.imread(str(paths[(number * BATCH + place) % len(paths)]), cv2.IMREAD_COLOR_RGB)
            side = int(min(picture.shape[:2]) * random.uniform(0.5, 1))
            top, left = (random.integers(0, length - side + 1) for length in picture.shape[:2])
            crop = picture[top : top + side, left : left + side]
            batch.append(cv2.resize(crop, (config.size, config.size), interpolation=cv2.INTER_AREA))
        from_uint8(np.stack(batch))
    return config.batches * BATCH / (time.perf_counter() - started)


def ours(config: BenchmarkConfig, media: MediaConfig) -> dict[str, float]:
    """Pictures per second as fast as they come, and the share of waiting beside computing."""
    training = TrainingMedia(media, seed=0, chunk_frames=4)
    training.batch(1)  # starts the threads
    started = time.perf_counter()
    for step in range(2, config.batches + 2):
        training.batch(step)
    rate = config.batches * BATCH / (time.perf_counter() - started)
    waited = 0.0
    steps = range(config.batches + 2, config.batches + 12)
    for step in steps:
        started = time.perf_counter()
        training.batch(step)
        waited += time.perf_counter() - started
        _compute(config.step_seconds)
    training.close()
    return {"pictures_per_second": rate, "waiting_share": waited / (waited + len(steps) * config.step_seconds)}


def _compute(seconds: float) -> None:
    """Keep one core busy as a training step does: in torch, without Python's lock."""
    numbers = torch.randn(512, 512)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        numbers = torch.tanh(numbers @ numbers)


def main(argv: list[str]) -> None:
    """Run the program with the arguments after its name."""
    config = load(BenchmarkConfig, argv, prog="benchmarks/media_loader.py")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jpegs(config, folder)
        base = MediaConfig(
            inputs=[name], size=config.size, batch_size=BATCH, augmented_share=1.0, cache_megabytes=0, loader="cpu"
        )
        rows = [{"what": "plain OpenCV loop", "pictures_per_second": plain_loop(config, folder)}]
        for loader in config.loaders:
            for workers in config.workers:
                media = replace(base, loader=loader, workers=workers)
                rows.append({"what": f"{loader}, {workers} threads"} | ours(config, media))
    print(f"{config.height}x{config.width} JPEGs to {config.size}x{config.size}, random crops, batches of {BATCH}")
    print(f"{'':22}{'pictures/s':>12}{'waiting':>10}")
    for row in rows:
        waiting = f"{row['waiting_share']:9.1%}" if "waiting_share" in row else ""
        print(f"{row['what']:22}{row['pictures_per_second']:12.0f} {waiting}")
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)

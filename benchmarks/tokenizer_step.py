"""A training step of a vision tokenizer on the CPU, by optimizer, and beside decoding threads that split torch's
operations over the cores, as torch does by default: `python benchmarks/tokenizer_step.py`.

The steps are those of the training itself, quantisation included. The variants take turns, so that a machine that
slows down slows all of them. Prints a table of medians and writes JSON.
"""

import contextlib
import json
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from megatron_ext.config import load, run_program
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.files import replacing
from megatron_ext.runtime import Topology
from megatron_ext.runtime.precision import settle_precision
from tokenizer_train.vision import data
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig
from tokenizer_train.vision.optimizer import NetworkOptimizer
from tokenizer_train.vision.start import initial_tokenizer
from tokenizer_train.vision.trial import trial_steps


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time training steps of a vision tokenizer."""

    training: str = "examples/movqgan_tiny_cpu.yaml"
    """The training's configuration."""

    turns: int = 6
    """Turns of each variant."""

    steps: int = 20
    """Steps of a turn."""

    output: str = "runs/benchmarks/tokenizer_step.json"
    """Where the figures go."""


WARM_UP = 3
"""Steps of a turn that are not timed: threads start, memory is taken."""


def turn(config: VisionTokenizerTrainingConfig, topology: Topology, steps: int) -> float:
    """Median seconds of a step with new media and decoding threads."""
    with trial_steps(config, topology) as trial:
        seconds = []
        for step in range(1, WARM_UP + steps + 1):
            started = time.perf_counter()
            trial.run(config.codebook.start_step + 1 + step)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP:])


def muon_step(config: VisionTokenizerTrainingConfig, steps: int, *, by_torch: bool) -> float:
    """Median seconds of Muon's step alone: ours, or torch's with the kernels as matrices."""
    muon = NetworkOptimizer(initial_tokenizer(config).model, config.optim, config.train.train_steps).muon
    weights = [kernel for group in muon.param_groups for kernel in group["params"]]
    if by_torch:
        weights = [nn.Parameter(kernel.detach().flatten(1).clone()) for kernel in weights]
        muon = torch.optim.Muon(weights, lr=config.optim.lr, adjust_lr_fn="match_rms_adamw")
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    seconds = []
    for _ in range(WARM_UP + steps):
        started = time.perf_counter()
        muon.step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP:])


def main(argv: list[str]) -> None:
    """Run the program with the arguments after its name."""
    config = load(BenchmarkConfig, argv, prog="benchmarks/tokenizer_step.py")
    training = load(VisionTokenizerTrainingConfig, ["--config", config.training], prog="benchmarks/tokenizer_step.py")
    precision = settle_precision(training.train.precision, torch.device("cpu")).name
    training = replace(training, train=replace(training.train, precision=precision))
    ours, adam = (
        replace(training, optim=replace(training.optim, optimizer=optimizer)) for optimizer in ("muon", "adam")
    )
    cores = len(os.sched_getaffinity(0))
    splitting = mock.patch.object(data, "keep_to_one_core", lambda: torch.set_num_threads(cores))
    variants = {
        "step, muon": lambda: turn(ours, topology, config.steps),
        "step, adam": lambda: turn(adam, topology, config.steps),
        "step, muon, decoding threads split operations": lambda: turn(ours, topology, config.steps),
        "Muon alone, kernels of a shape together": lambda: muon_step(ours, config.steps, by_torch=False),
        "torch.optim.Muon alone, matrix by matrix": lambda: muon_step(ours, config.steps, by_torch=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with Topology.alone(RuntimeConfig(num_threads=training.train.num_threads)) as topology:
        for _ in range(config.turns):
            for name, variant in variants.items():
                with splitting if "split" in name else contextlib.nullcontext():
                    seconds[name].append(variant())
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    for name, median in medians.items():
        print(f"{name:50}{1000 * median:8.1f} ms{median / medians['step, muon']:8.2f}")
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as path:
        path.write_text(json.dumps({"seconds": seconds, "medians": medians}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)

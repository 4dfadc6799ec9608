"""How fast this machine takes the steps of the quickstart's trainings, from a few of each.

torchrun --nproc-per-node 2 examples/quickstart_pace.py --output runs/quickstart/pace.json

The steps are the trainings' own, on the same media and on windows of random ids; their result is thrown away. The file
says how many seconds a step of each training takes, and how many a program takes to start.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil

from megatron_ext.config import load, run_program
from megatron_ext.config.run import RunConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.config.section import Count, Name, Section
from megatron_ext.data.batch import collate, slice_for_context
from megatron_ext.data.windows import Window
from megatron_ext.files import replacing
from megatron_ext.model import build_model
from megatron_ext.objectives import build_objective
from megatron_ext.optim import build_optimizer
from megatron_ext.runtime import Topology
from megatron_ext.runtime.faults import is_told_here
from megatron_ext.train import MicrobatchRunner
from megatron_ext.vocab import VocabLayout
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig
from tokenizer_train.vision.trial import trial_steps

STEPS = 5
"""Steps of each training that are timed, after one that is not: memory is taken in it."""

FIRST_LAYOUT = (
    *("--parallel.tensor_model_parallel_size", "2", "--parallel.sequence_parallel", "true"),
    *("--train.micro_batch_size", "2"),
)
"""What the quickstart adds to the decoder's configuration at first."""

PROGRAM = "quickstart_pace.py"


@dataclass(frozen=True, kw_only=True)
class PaceConfig(Section):
    """Time a few steps of the quickstart's trainings."""

    tokenizer: Name = "examples/movqgan_tiny_cpu.yaml"
    """The vision tokenizer's training."""

    decoder: Name = "examples/tiny_cpu.yaml"
    """The decoder's."""

    text_ids: Count = 1000
    """Ids of the text tokenizer that is not there yet."""

    output: Name
    """Where the seconds go."""


def median_seconds(step: Callable[[int], object]) -> float:
    """Of `step(number)`."""
    step(0)
    seconds = []
    for number in range(1, STEPS + 1):
        started = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def tokenizer_step(config: VisionTokenizerTrainingConfig) -> float:
    """Seconds of a step of the vision tokenizer's training, which is one process with a thread for each core."""
    runtime = RuntimeConfig(device="cpu", precision=config.train.precision, num_threads=len(os.sched_getaffinity(0)))
    with Topology.alone(runtime) as topology:
        config = replace(config, train=replace(config.train, precision=topology.precision.name))
        quantized = config.codebook.start_step + 2  # the step before places the codes
        with trial_steps(config, topology) as steps:
            return median_seconds(lambda number: steps.run(quantized + number))


def decoder_step(config: RunConfig, layout: VocabLayout) -> float | None:
    """Seconds of a step of the decoder's training on windows of random ids, on rank 0."""
    with Topology.start(config.runtime, config.parallel) as topology:
        model = build_model(config.model, config.parallel, layout, topology, config.train.seed)
        optimizer = build_optimizer(config.optim, config.parallel, model, topology, config.train.train_steps)
        objective = build_objective(config.objective, layout)
        runner = MicrobatchRunner(optimizer.model, objective, topology, seed=config.train.seed)
        windows = [random_window(config.train.seq_length, layout)] * config.train.micro_batch_size
        row = collate(windows, [0] * len(windows), config.data.attention_scope)
        batch = slice_for_context(row, topology.context_parallel_rank, topology.context_parallel_size)
        accumulated = config.train.global_batch_size // (config.train.micro_batch_size * topology.data_parallel_size)

        def step(number: int) -> None:
            optimizer.zero_grad()
            runner.run([batch] * accumulated, ("random",), step=number)
            optimizer.step(number + 1)

        seconds = median_seconds(step)
        return seconds if topology.is_main else None


def random_window(seq_length: int, layout: VocabLayout) -> Window:
    """Documents about as long as those of the sample media."""
    ids = np.random.default_rng(0).integers(0, layout.size, seq_length)
    boundaries = np.append(np.arange(0, seq_length, seq_length // 3), seq_length)
    return Window(ids=ids, labels=np.roll(ids, -1), mask=np.ones(seq_length, dtype=bool), boundaries=boundaries)


def main(argv: list[str]) -> None:
    """Measure, and write the file on rank 0."""
    start_s = time.time() - psutil.Process().create_time()
    paths = load(PaceConfig, argv, prog=PROGRAM)
    decoder = load(RunConfig, ["--config", paths.decoder, *FIRST_LAYOUT], prog=PROGRAM)
    tokenizer = load(VisionTokenizerTrainingConfig, ["--config", paths.tokenizer], prog=PROGRAM)
    layout = VocabLayout.custom(text_size=paths.text_ids, codebook_size=decoder.vocab.codebook_size)
    decoder_s = decoder_step(decoder, layout)
    if decoder_s is None:
        return
    step_s = {paths.decoder: decoder_s, paths.tokenizer: tokenizer_step(tokenizer)}
    Path(paths.output).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(paths.output)) as temporary:
        temporary.write_text(json.dumps({"start_s": start_s, "step_s": step_s}, indent=1) + "\n")
    for path, seconds in step_s.items():
        print(f"{path}: {seconds:.2f} s a step")


if __name__ == "__main__":
    run_program(main, tells=is_told_here)

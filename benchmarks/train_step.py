"""A training step against plain transformers: `python benchmarks/train_step.py`.

Same weights, batch, type (fp32), optimizer (AdamW, clipping at 1) and threads; no dropout. Time is the median over
interleaved pairs of steps in one process, after both have trained one step and agree on its loss. Memory is the peak of
a process of its own, above what weights, gradients and moments take. Then what tensor, context and data parallelism of
two ranks with one thread each add to the step of one process with two. Prints tables and writes JSON.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch

from megatron_ext.config import InputError, load, run_program
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.objective import ObjectiveConfig
from megatron_ext.config.optim import OptimConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.data.batch import Batch, collate, slice_for_context
from megatron_ext.data.windows import Window
from megatron_ext.vocab import VocabLayout

OPTIM = OptimConfig(lr=1e-4, lr_decay_style="constant", weight_decay=0.1, clip_grad=1.0)
LAYOUTS = {
    "tp2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "cp2": ParallelConfig(context_parallel_size=2),
    "dp2": ParallelConfig(),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of the comparison."""

    model: ModelConfig
    layout: VocabLayout
    seq_length: int
    windows: int = 2
    """Windows of a step, each one document."""


CASES = {
    "tiny": Case(
        model=ModelConfig(preset="tiny", attention_dropout=0.0, hidden_dropout=0.0),
        layout=VocabLayout.custom(text_size=1000, codebook_size=512),
        seq_length=1024,
    ),
    # The head's share of Emu3-8B, narrow: what the vocabulary alone costs.
    "slice": Case(
        model=ModelConfig(preset="tiny", num_layers=2, attention_dropout=0.0, hidden_dropout=0.0),
        layout=VocabLayout.emu3(),
        seq_length=5120,
        windows=1,
    ),
}


WARM_UP = Case(
    model=ModelConfig(preset="tiny", num_layers=1, hidden_size=32, ffn_hidden_size=32, kv_channels=8,
                      attention_dropout=0.0, hidden_dropout=0.0),
    layout=VocabLayout.custom(text_size=64, codebook_size=64), seq_length=64,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time and memory of a training step on the CPU, against transformers' Emu3ForCausalLM."""

    cases: tuple[Literal["tiny", "slice"], ...] = ("tiny", "slice")
    """Shapes to measure: the quickstart's decoder, and two narrow layers under Emu3's whole vocabulary."""

    pairs: int = 5
    """Interleaved pairs of steps that are timed; at least 5."""

    threads: int = 2
    """CPU threads of one process."""

    part: Literal["all", "time", "peak_ours", "peak_theirs", "one", "tp2", "cp2", "dp2"] = "all"
    """What this process measures; `all` starts the others."""

    output: str = "runs/benchmarks/train_step.json"
    """Where the figures go."""


def global_batch(case: Case) -> list[Window]:
    """Windows of one random document each."""
    windows = []
    for seed in range(case.windows):
        ids = np.random.default_rng(seed).integers(0, case.layout.size, case.seq_length)
        mask = np.arange(case.seq_length) < case.seq_length - 1
        boundaries = np.array([0, case.seq_length])
        windows.append(Window(ids=ids, labels=np.roll(ids, -1), mask=mask, boundaries=boundaries))
    return windows


class Ours:
    """This project's step, on whatever layout `topology` has."""

    def __init__(self, case: Case, parallel: ParallelConfig, topology: object) -> None:
        from megatron_ext.model import build_model
        from megatron_ext.objectives import build_objective
        from megatron_ext.optim import build_optimizer
        from megatron_ext.train.step import MicrobatchRunner

        self.model = build_model(case.model, parallel, case.layout, topology, seed=1)
        self.optimizer = build_optimizer(OPTIM, parallel, self.model, topology, steps=1)
        objective = build_objective(ObjectiveConfig(vision_loss_weight=1.0), case.layout)
        self.runner = MicrobatchRunner(self.optimizer.model, objective, topology, seed=1)
        mine = global_batch(case)[topology.data_parallel_rank :: topology.data_parallel_size]
        row = collate(mine, [0] * len(mine), "document")
        self.batch: Batch = slice_for_context(row, topology.context_parallel_rank, topology.context_parallel_size)

    def step(self) -> float:
        self.optimizer.zero_grad()
        losses = self.runner.run([self.batch], ("random",), step=0)
        self.optimizer.step(1)
        return losses["loss"]


class Theirs:
    """transformers' Emu3ForCausalLM as its users train it."""

    def __init__(self, case: Case, weights: dict[str, torch.Tensor] | None = None) -> None:
        from transformers import Emu3ForCausalLM, Emu3TextConfig

        from megatron_ext.hf.decoder import text_config
        from megatron_ext.plan import DecoderShape

        config = text_config(DecoderShape.of(case.model), case.layout, case.seq_length)
        self.model = Emu3ForCausalLM(Emu3TextConfig(**config, use_cache=False)).train()
        if weights is not None:
            self.model.load_state_dict(weights)
        matrices = [weight for weight in self.model.parameters() if weight.dim() > 1]
        norms = [weight for weight in self.model.parameters() if weight.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": OPTIM.weight_decay}, {"params": norms, "weight_decay": 0.0}],
            lr=OPTIM.lr, betas=(OPTIM.adam_beta1, OPTIM.adam_beta2), eps=OPTIM.adam_eps,
        )  # fmt: skip
        self.ids = torch.stack([torch.from_numpy(window.ids) for window in global_batch(case)])

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIM.clip_grad)
        self.optimizer.step()
        return loss.item()


def timed(step: Callable[[], float]) -> float:
    """Seconds of one step."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def compare_time(case: Case, config: BenchmarkConfig, topology: object) -> dict:
    from megatron_ext.hf import decoder_tensors

    ours = Ours(case, ParallelConfig(), topology)
    theirs = Theirs(case, dict(decoder_tensors(ours.model)))
    first = ours.step(), theirs.step()
    if abs(first[0] - first[1]) > 1e-4 * first[1]:
        raise InputError(f"the first losses are {first[0]} and {first[1]}: the two do not train the same model")
    pairs = [(timed(ours.step), timed(theirs.step)) for _ in range(config.pairs)]
    ratios = sorted(theirs_s / ours_s for ours_s, theirs_s in pairs)
    return {
        "ours_s": statistics.median(pair[0] for pair in pairs),
        "theirs_s": statistics.median(pair[1] for pair in pairs),
        "speed_ratio": statistics.median(ratios),
        "spread": [ratios[0], ratios[-1]],
    }


def measure_peak(build: Callable[[Case], Ours | Theirs], case: Case) -> dict:
    """Peak of this process over two steps: whole, and above weights, gradients and both moments in fp32."""
    build(WARM_UP).step()
    before = psutil.Process().memory_info().rss  # libraries and thread pools
    side = build(case)
    state = 16 * sum(weight.numel() for weight in side.model.parameters())
    side.step()
    side.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_gib": peak / 2**30, "above_state_gib": (peak - before - state) / 2**30}


def measure_layout(case: Case, config: BenchmarkConfig, parallel: ParallelConfig, topology: object) -> dict:
    ours = Ours(case, parallel, topology)
    ours.step()
    return {"step_s": statistics.median(timed(ours.step) for _ in range(config.pairs))}


def run_part(case: Case, config: BenchmarkConfig) -> dict:
    """What `config.part` measures, in this process (one of two for a layout)."""
    from megatron_ext.runtime import Topology

    parallel = LAYOUTS.get(config.part, ParallelConfig())
    # The layouts of two ranks share the threads that one process has.
    threads = max(1, config.threads // 2) if config.part in LAYOUTS else config.threads
    with Topology.start(RuntimeConfig(device="cpu", num_threads=threads), parallel) as topology:
        if config.part == "time":
            return compare_time(case, config, topology)
        if config.part == "peak_ours":
            return measure_peak(lambda case: Ours(case, parallel, topology), case)
        if config.part == "peak_theirs":
            return measure_peak(Theirs, case)
        result = measure_layout(case, config, parallel, topology)
        return result if topology.is_main else {}


def start_part(name: str, part: str, config: BenchmarkConfig) -> dict:
    """Run a part in processes of its own; its figures come back as the last line of its output."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if part in LAYOUTS else []
    options = ["--cases", f"[{name}]", "--part", part, "--pairs", str(config.pairs), "--threads", str(config.threads)]
    command = [sys.executable, *torchrun, __file__, *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise InputError(f"{' '.join(command)} failed: {result.stderr.strip().splitlines()[-1]}")
    return json.loads([line for line in result.stdout.splitlines() if line.startswith("{")][-1])


def measure(name: str, config: BenchmarkConfig) -> dict:
    figures = {"case": name, **start_part(name, "time", config)}
    ours, theirs = start_part(name, "peak_ours", config), start_part(name, "peak_theirs", config)
    figures |= {f"ours_{key}": value for key, value in ours.items()}
    figures |= {f"theirs_{key}": value for key, value in theirs.items()}
    figures["memory_ratio"] = ours["above_state_gib"] / theirs["above_state_gib"]
    if name == "tiny":
        one = start_part(name, "one", config)["step_s"]
        figures |= {f"{layout}_adds": start_part(name, layout, config)["step_s"] / one - 1 for layout in LAYOUTS}
    return figures


def main(argv: list[str]) -> None:
    config = load(BenchmarkConfig, argv, prog="train_step")
    if config.pairs < 5:
        raise InputError(f"pairs {config.pairs}: at least 5, for a median with a spread")
    if config.part != "all":
        figures = run_part(CASES[config.cases[0]], config)
        if figures:
            print(json.dumps(figures), flush=True)
        return
    rows = [measure(name, config) for name in config.cases]
    for row in rows:
        print(f"{row['case']}: ours {row['ours_s']:.3f} s, transformers {row['theirs_s']:.3f} s a step: "
              f"{row['speed_ratio']:.2f} times as fast ({row['spread'][0]:.2f} to {row['spread'][1]:.2f})")  # fmt: skip
        print(f"  peak above weights, gradients and moments {row['ours_above_state_gib']:.2f} GiB of "
              f"{row['theirs_above_state_gib']:.2f} GiB ({row['memory_ratio']:.3f}); whole process "
              f"{row['ours_peak_gib']:.2f} of {row['theirs_peak_gib']:.2f} GiB")  # fmt: skip
        for layout in LAYOUTS:
            if f"{layout}_adds" in row:
                print(f"  {layout} on two ranks adds {100 * row[f'{layout}_adds']:.0f}% to a step")
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(
        json.dumps({"torch": torch.__version__, "threads": config.threads, "rows": rows}, indent=2) + "\n"
    )


if __name__ == "__main__":
    run_program(main)

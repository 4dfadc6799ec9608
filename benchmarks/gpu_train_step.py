"""Speed of a training step of full-width decoder layers on one device: `python benchmarks/gpu_train_step.py`.

Emu3 8B with its optimizer does not fit one GPU (2 + 4 + 4 + 8 bytes a weight: 153 GB). So a few of its layers are
trained, at full width and full vocabulary, at two depths. Two kinds of figures come of it:

- measured: a step of the deeper one: forward, backward, clipping and AdamW on one row of windows;
- extrapolated, in the columns marked ~: forward and backward of the whole decoder. The difference of the two depths is
  a layer's time; what is left of the deeper one is embedding, head and fixed cost. Neither optimizer nor communication
  is in it.

Named alternatives, in the same run: the decoder with megatron-core's own head, which holds the logits, and
transformers' LlamaForCausalLM (torch's attention, the same AdamW with fp32 master weights). FLOPs are the model's by
the causal convention (megatron_ext/plan/flops.py): what recomputation adds is not counted. Peaks are dense.

It needs no data, no tokenizer, no compiled packer and no argument parser but Python's: a bare GPU machine with torch,
Transformer Engine and megatron-core runs it. `--device cpu --preset tiny --seq_lengths 64` tries it anywhere.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib.metadata
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_ext.config.errors import run_program
from megatron_ext.config.objective import ObjectiveConfig
from megatron_ext.config.optim import OptimConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.data.batch import Batch, Window, collate
from megatron_ext.files import replacing
from megatron_ext.model import Emu3Model
from megatron_ext.model.emu3 import transformer_config
from megatron_ext.model.specs import check_modules, layer_specs
from megatron_ext.objectives import build_objective
from megatron_ext.optim import build_optimizer
from megatron_ext.plan import PRESETS, DecoderShape, flops_per_token, pad_vocabulary
from megatron_ext.runtime import Topology, seed_microbatch
from megatron_ext.runtime.device import choose_device, peak_memory_bytes, synchronize
from megatron_ext.train.step import MicrobatchRunner
from megatron_ext.vocab import VocabLayout

LAYOUTS = {
    "tiny": VocabLayout.custom(text_size=1000, codebook_size=1000),
    "emu3_8b": VocabLayout.emu3(),
    "emu3_5_34b": VocabLayout.emu3_5(),
}
RECOMPUTE = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
PEAKS = {"NVIDIA H100 80GB HBM3": (989.4e12, 1978.9e12), "NVIDIA H200": (989.4e12, 1978.9e12)}
"""Device name -> dense FLOP/s in bf16 and FP8 (NVIDIA's data sheets of the SXM parts; theirs are with sparsity)."""


@dataclass(frozen=True)
class Case:
    """What is trained."""

    system: str
    """ours | plain head | transformers."""

    seq_length: int
    precision: str
    dropout: float
    """On attention weights and on hidden states; transformers has the first only."""

    recompute: str


def all_cases(seq_lengths: list[int], precisions: list[str]) -> list[Case]:
    """The most telling first: time may run out."""
    cases = []
    for seq_length in seq_lengths:
        cases += [Case("ours", seq_length, precision, 0.0, "none") for precision in precisions]
        cases += [Case(system, seq_length, precisions[0], 0.0, "none") for system in ("transformers", "plain head")]
        cases += [Case("ours", seq_length, precision, 0.1, "none") for precision in precisions]
        cases += [Case("ours", seq_length, precisions[0], 0.0, recompute) for recompute in ("selective", "full")]
    return cases


@dataclass(frozen=True)
class Step:
    """The two halves of a training step; the argument is the number of the step."""

    forward_backward: Callable[[int], Any]
    optimize: Callable[[int], Any]


class PlainHead(GPTModel):
    """megatron-core's decoder with its own head."""

    forward_batch = Emu3Model.forward_batch


@contextlib.contextmanager
def ours(case: Case, shape: DecoderShape, layout: VocabLayout, batch: Batch, device: str) -> Iterator[Step]:
    """The product's own training step, with either head."""
    parallel = ParallelConfig(**RECOMPUTE[case.recompute])
    with Topology.start(RuntimeConfig(device=device, precision=case.precision), parallel) as topology:
        check_modules(topology.device)
        decoder = build_decoder(case, shape, layout, parallel, topology)
        optimizer = build_optimizer(OptimConfig(lr_decay_style="constant"), parallel, decoder, topology, 1)
        objective = build_objective(ObjectiveConfig(), layout)
        runner = MicrobatchRunner(optimizer.model, objective, topology, seed=0)

        def forward_backward(step: int) -> None:
            optimizer.zero_grad()
            runner.run([batch], ("random",), step=step)

        yield Step(forward_backward, lambda step: optimizer.step(step + 1))


def build_decoder(
    case: Case, shape: DecoderShape, layout: VocabLayout, parallel: ParallelConfig, topology: Topology
) -> GPTModel:
    """Weights are drawn on the device: `build_model`'s, a function of seed and name, take a CPU minutes here."""
    config = transformer_config(shape, parallel, topology)
    seed_microbatch(0, 0, 0, topology)
    if case.system == "ours":
        decoder = Emu3Model(config, shape, layout, topology)
    else:
        decoder = PlainHead(
            config=config,
            transformer_layer_spec=layer_specs(config, topology.device),
            vocab_size=pad_vocabulary(layout.size, 1),
            max_sequence_length=0,
            position_embedding_type="rope",
            rotary_base=shape.rotary_base,
            share_embeddings_and_output_weights=False,
            pg_collection=topology.groups,
        )
    decoder = decoder.to(topology.device)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, shape.init_method_std)
    return decoder


@contextlib.contextmanager
def transformers_llama(
    case: Case, shape: DecoderShape, layout: VocabLayout, batch: Batch, device: str
) -> Iterator[Step]:
    """transformers' Llama of the same shape: a plain loop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    where = choose_device(RuntimeConfig(device=device), 0)
    config = LlamaConfig(
        vocab_size=layout.size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.kv_channels,
        attention_dropout=case.dropout,
        rms_norm_eps=shape.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rotary_base},
        max_position_embeddings=case.seq_length,
        attn_implementation="sdpa",
        use_cache=False,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if case.precision == "bf16" else torch.float32)
    try:
        with where:
            model = LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(default)
    optim = OptimConfig()
    settings = {"lr": optim.lr, "betas": (optim.adam_beta1, optim.adam_beta2), "weight_decay": optim.weight_decay}
    if where.type == "cpu":
        optimizer = torch.optim.AdamW(model.parameters(), **settings)
    else:
        from transformer_engine.pytorch.optimizers import FusedAdam

        optimizer = FusedAdam(model.parameters(), master_weights=True, **settings)
    tokens_WS = batch.tokens_BT.view(-1, case.seq_length).to(where)

    def forward_backward(step: int) -> None:
        optimizer.zero_grad()
        model(input_ids=tokens_WS, labels=tokens_WS).loss.backward()

    def optimize(step: int) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        optimizer.step()

    yield Step(forward_backward, optimize)


SYSTEMS = {"ours": ours, "plain head": ours, "transformers": transformers_llama}


def random_batch(seq_length: int, windows: int, layout: VocabLayout) -> Batch:
    """One row of windows of random ids; attention sees the whole window."""
    rng = np.random.default_rng(0)
    bounds, mask = np.array([0, seq_length]), np.ones(seq_length, dtype=bool)
    rows = [rng.integers(0, layout.size, seq_length) for _ in range(windows)]
    packed = [Window(ids=ids, labels=np.roll(ids, -1), mask=mask, boundaries=bounds) for ids in rows]
    return collate(packed, [0] * windows, "window")


def timed(step: Step, device: torch.device, warmup: int, steps: int) -> dict[str, float]:
    """Medians over `steps` steps after `warmup`; seconds, and the peak memory of those steps."""
    passes, updates = [], []
    for number in range(warmup + steps):
        if number == warmup and device.type != "cpu":
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        step.forward_backward(number)
        synchronize(device)
        passed = time.perf_counter()
        step.optimize(number)
        synchronize(device)
        passes.append(passed - started)
        updates.append(time.perf_counter() - passed)
    passes, updates = passes[warmup:], updates[warmup:]
    return {
        "step_seconds": statistics.median(map(sum, zip(passes, updates, strict=True))),
        "forward_backward_seconds": statistics.median(passes),
        "optimizer_seconds": statistics.median(updates),
        "spread_percent": 100 * (max(passes) - min(passes)) / statistics.median(passes),
        "peak_memory_gib": peak_memory_bytes(device) / 2**30,
    }


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The case at every depth; figures of the deepest, and the extrapolation."""
    layout = LAYOUTS[options.preset]
    whole = dataclasses.replace(PRESETS[options.preset], attention_dropout=case.dropout, hidden_dropout=case.dropout)
    batch = random_batch(case.seq_length, options.windows, layout)
    device = choose_device(RuntimeConfig(device=options.device), 0)
    depths = {}
    for depth in sorted(options.depths):
        free(device)
        shape = dataclasses.replace(whole, num_layers=depth)
        with SYSTEMS[case.system](case, shape, layout, batch, options.device) as step:
            depths[depth] = timed(step, device, options.warmup, options.steps)
        del step
    tokens = batch.tokens_BT.numel()

    def speed(seconds: float, num_layers: int) -> dict[str, float]:
        shape = dataclasses.replace(whole, num_layers=num_layers)
        flops = flops_per_token(shape, case.seq_length, vocab_size=layout.size)
        return with_percent({"tokens_per_second": tokens / seconds, "tflops": tokens / seconds * flops / 1e12}, device)

    shallow, deep = min(depths), max(depths)
    row = dataclasses.asdict(case) | {"num_layers": deep, **depths[deep]} | speed(depths[deep]["step_seconds"], deep)
    if shallow < deep:
        seconds = extrapolated(depths, whole.num_layers)
        row["whole"] = {"num_layers": whole.num_layers, "forward_backward_seconds": seconds}
        row["whole"] |= speed(seconds, whole.num_layers)
    return row | {"depths": depths}


def extrapolated(depths: dict[int, dict[str, float]], num_layers: int) -> float:
    """Seconds of forward and backward of `num_layers` layers: a line through the shallowest and the deepest."""
    shallow, deep = min(depths), max(depths)
    first, last = (depths[depth]["forward_backward_seconds"] for depth in (shallow, deep))
    return last + (last - first) / (deep - shallow) * (num_layers - deep)


def with_percent(speed: dict[str, float], device: torch.device) -> dict[str, float]:
    """Percent of both peaks, where they are known."""
    peaks = PEAKS.get(device_name(device))
    if peaks:
        for name, peak in zip(("bf16", "fp8"), peaks, strict=True):
            speed[f"percent_of_{name}_peak"] = 100 * speed["tflops"] * 1e12 / peak
    return speed


def free(device: torch.device) -> None:
    """Give back the memory of what was trained before."""
    gc.collect()
    if device.type != "cpu":
        torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    versions = {}
    for package in ("torch", "megatron-core", "transformer-engine", "transformers", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": " ".join([sys.executable, *sys.argv]),
        "device": device_name(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type != "cpu" else None,
        "python": sys.version.split()[0],
        "versions": versions,
    }


COLUMNS = {
    "system": 12, "seq_length": 10, "precision": 9, "dropout": 7, "recompute": 9, "num_layers": 10, "step_seconds": 12,
    "tokens_per_second": 17, "tflops": 7, "percent_of_bf16_peak": 20, "percent_of_fp8_peak": 19, "peak_memory_gib": 15,
    "~tokens_per_second": 18, "~tflops": 7, "~percent_of_bf16_peak": 21,
}  # fmt: skip


def table_line(row: dict[str, Any]) -> str:
    """One line of the table; ~ columns are the extrapolation's."""
    whole = {f"~{name}": value for name, value in row.get("whole", {}).items()}
    cells = [(row | whole).get(name, "") for name in COLUMNS]
    texts = [f"{cell:,.4g}" if isinstance(cell, float) and cell < 1000 else f"{cell:,.0f}" if isinstance(cell, float)
             else str(cell) for cell in cells]  # fmt: skip
    return "  ".join(f"{text:>{width}}" for text, width in zip(texts, COLUMNS.values(), strict=True)) + row.get(
        "error", ""
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--preset", default="emu3_8b", choices=sorted(LAYOUTS), help="width and vocabulary")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4], help="layers; two or more to extrapolate")
    parser.add_argument("--seq_lengths", type=int, nargs="+", default=[5_120, 32_768])
    parser.add_argument("--windows", type=int, default=1, help="windows in the row")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=8, help="steps whose median is taken")
    parser.add_argument("--budget_s", type=float, default=480.0, help="no case begins after this many seconds")
    parser.add_argument("--only", default="", help="part of a case's line: ours, fp8, transformers, ...")
    parser.add_argument("--output", default="runs/benchmarks/gpu_train_step.json")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options, begun = parse(argv), time.monotonic()
    device = choose_device(RuntimeConfig(device=options.device), 0)
    precisions = ["fp32"] if device.type == "cpu" else ["bf16", "fp8"]
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    print("  ".join(f"{name:>{width}}" for name, width in COLUMNS.items()), flush=True)
    rows, failed = [], False
    for case in all_cases(options.seq_lengths, precisions):
        if options.only not in str(case):
            continue
        if time.monotonic() - begun > options.budget_s:
            row = dataclasses.asdict(case) | {"error": "not run: the time was up"}
        else:
            try:
                row = measure(case, options)
            except torch.OutOfMemoryError:  # a result, above all of those that hold the logits
                row = dataclasses.asdict(case) | {"error": "out of memory"}
            except Exception as error:  # the others still count; the exit code tells
                failed = True
                traceback.print_exc()
                reason = (str(error).splitlines() or [""])[0]
                row = dataclasses.asdict(case) | {"error": f"{type(error).__name__}: {reason}"}
        rows.append(row)
        print(table_line(row), flush=True)
        with replacing(output) as temporary:
            temporary.write_text(json.dumps({"environment": environment(device), "rows": rows}, indent=2) + "\n")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_program(main)

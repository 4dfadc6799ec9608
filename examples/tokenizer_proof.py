"""Proof that the vision tokenizer's training learns, on real photographs: python examples/tokenizer_proof.py

Fetches photographs, trains a small tokenizer on the mean squared error, goes on from there twice for the same number
of steps, on the same error alone and with the perceptual loss, and evaluates both on photographs that were held out.
The curve, the tables and the grid go to docs/tokenizer_proof/, the tables into docs/tokenizer.md as well.

Every command is printed before it runs. Each takes up what is there, so that an interrupted proof goes on. How many
steps fit into `minutes` on this machine is measured first, and kept in runs/tokenizer_proof/steps.json.
"""

import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

from megatron_ext.config import InputError, load, run_program
from megatron_ext.config.section import Name, Number, Positive, Section
from megatron_ext.files import read_json_lines, replacing
from megatron_ext.observe.writers import duration

ROOT = Path("runs/tokenizer_proof")
MEDIA = ROOT / "media"
DOCS = Path("docs/tokenizer_proof")
PAGE = Path("docs/tokenizer.md")
BEGIN, END = "<!-- proof: written by examples/tokenizer_proof.py -->", "<!-- end of proof -->"

COMMON, L2, PERCEPTUAL = "common", "l2", "perceptual"
CONFIGS = {
    COMMON: ("examples/movqgan_proof.yaml",),
    L2: ("examples/movqgan_proof.yaml", "examples/movqgan_proof_l2.yaml"),
    PERCEPTUAL: ("examples/movqgan_proof.yaml", "examples/movqgan_proof_perceptual.yaml"),
}
SIZE = 256

COMMON_SHARE = 0.6
"""Share of the minutes for the first part: small crops, on which most is learnt in the least time."""

RESTART_SHARE = 0.6
"""Share of the second part's steps with restarts of dead codes; then they settle."""

GRID_SAMPLES, GRID_QUALITY = 4, 80

TRIAL_STEPS = 24
SLOW_STEPS = 4  # the first ones decode, allocate and choose kernels

TARGET_DB, TARGET_USED, TARGET_CODES, TARGET_SECONDS = 1.5, 0.8, 4096, 3600

COLUMNS = (
    ("name", "codec", "{}"), ("bits_per_pixel", "bits/pixel", "{:.3f}"), ("psnr", "PSNR dB", "{:.2f}"),
    ("ssim", "SSIM", "{:.4f}"), ("perceptual", "EfficientNet-Lite0 distance", "{:.4f}"),
    ("codes_used", "codes in use", "{}"), ("perplexity", "perplexity", "{:.0f}"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ProofConfig(Section):
    """Fetch real media, train a small vision tokenizer twice, evaluate both, write docs/tokenizer_proof."""

    fresh: bool = False
    """Train anew; fetched media stay."""

    minutes: Positive = 57.0
    """Minutes that each of the two tokenizers trains, the part that they share included; the hour of the aim less what
    steps may turn out slower than in the trial."""

    num_threads: Number = 0
    """CPU threads of the trainings; 0 takes all cores."""

    python: Name = sys.executable
    """Interpreter that runs the programs."""


def train_command(config: ProofConfig, name: str, *options: str) -> list[str]:
    """The training `name`, with further options."""
    files = [part for file in CONFIGS[name] for part in ("--config", file)]
    threads = ["--train.num_threads", str(config.num_threads)]
    return [config.python, "-m", "tokenizer_train.vision.train", *files, *threads, *options]


def step_counts(config: ProofConfig) -> dict[str, int]:
    """Steps of each training: those of an earlier start, or as many as a short trial says fit into the minutes."""
    path = ROOT / "steps.json"
    if path.exists():
        return json.loads(path.read_text())
    seconds = {}
    for name in (COMMON, PERCEPTUAL):
        folder = ROOT / f"trial_{name}"
        shutil.rmtree(folder, ignore_errors=True)
        run_all([trial_command(config, name, folder)])
        records = [record for record in read_json_lines(folder / "metrics.jsonl") if "loss_l2" in record]
        seconds[name] = statistics.mean(record["timing"]["step_seconds"] for record in records[SLOW_STEPS:])
    return divide(config.minutes * 60, seconds, path)


def trial_command(config: ProofConfig, name: str, folder: Path) -> list[str]:
    """A few steps of a training, with quantisation from the first on, from random weights."""
    changes = {
        "observe.run_dir": folder, "train.train_steps": TRIAL_STEPS, "checkpoint.init_from": "null",
        "codebook.start_step": 0, "codebook.kmeans_batches": 4, "codebook.restart_until_step": 0,
        "optim.lr_warmup_steps": 1, "train.eval_samples": 1,
    }  # fmt: skip
    options = [part for key, value in changes.items() for part in (f"--{key}", str(value))]
    return train_command(config, name, *options)


def divide(total_s: float, seconds: dict[str, float], path: Path) -> dict[str, int]:
    """Steps of the two parts for so many seconds of training at so many seconds a step; also written to `path`."""
    common, second = COMMON_SHARE * total_s / seconds[COMMON], (1 - COMMON_SHARE) * total_s / seconds[PERCEPTUAL]
    counts = {COMMON: int(common), L2: int(second), PERCEPTUAL: int(second)}
    _replace(path, json.dumps(counts) + "\n")
    times = ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in seconds.items())
    print(f"a step takes: {times}; steps for {duration(total_s)} each: {counts}", flush=True)
    return counts


def commands(config: ProofConfig, steps: dict[str, int]) -> list[list[str]]:
    """The trainings and evaluations, one program after the other."""
    evaluate = [config.python, "-m", "tokenizer_train.vision.evaluate", "--sizes", f"[{SIZE}]"]
    tokenizers = [f"{name}={ROOT / name / 'tokenizer'}" for name in (L2, PERCEPTUAL)]
    held_out, train = str(MEDIA / "held_out"), str(MEDIA / "train")
    until = {COMMON: steps[COMMON], **{name: int(RESTART_SHARE * steps[name]) for name in (L2, PERCEPTUAL)}}
    trainings = [
        train_command(
            config, name, "--train.train_steps", str(count), "--codebook.restart_until_step", str(until[name])
        )
        for name, count in steps.items()
    ]
    return [
        *trainings,
        [
            *evaluate, "--inputs", json.dumps([held_out]), "--tokenizers", json.dumps(tokenizers),
            "--output", str(ROOT / "held_out"), "--grid_samples", str(GRID_SAMPLES),
        ],
        [
            *evaluate, "--inputs", json.dumps([held_out, train]), "--tokenizers", json.dumps(tokenizers),
            "--output", str(ROOT / "all"), "--references", "false", "--grid_samples", "0",
            # Codes in use are what is asked for here; the judging networks would take half an hour.
            "--perceptual", "none", "--frechet", "none",
        ],
    ]  # fmt: skip


def run_all(steps: Iterable[list[str]]) -> None:
    """Run the programs.

    Raises:
        InputError: one of them fails; what is finished stays.
    """
    for command in steps:
        print(f"\n$ {shlex.join(command)}", flush=True)
        began = time.monotonic()
        # Its own session: Ctrl-C reaches it once, from here, and it saves.
        process = subprocess.Popen(command, start_new_session=True)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
        if code:
            raise InputError(f"{command[1]} {command[2]} ended with exit code {code}: see above; run again to go on")
        print(f"done in {duration(time.monotonic() - began)}", flush=True)


def results(training_threads: int) -> dict[str, Any]:
    """What was reached: rows on the held-out photographs and on all of them, the times, and the verdicts."""
    held_out, everything = (json.loads((ROOT / name / "report.json").read_text()) for name in ("held_out", "all"))
    rows = {row["name"]: row for row in held_out["rows"]}
    of_all = {row["name"]: row for row in everything["rows"]}
    seconds = {name: _seconds(name) for name in CONFIGS}
    return {
        "format_version": 1,
        "seconds": seconds,
        "versions": held_out["versions"],
        "training_threads": training_threads,
        "threads": held_out["threads"],
        "held_out": held_out["rows"],
        "all": everything["rows"],
        "verdicts": verdicts(rows, of_all[PERCEPTUAL], seconds),
    }


def verdicts(
    rows: dict[str, dict[str, Any]], of_all: dict[str, Any], seconds: dict[str, float]
) -> list[dict[str, Any]]:
    """Aim, what was reached, and whether that is enough."""
    bicubic = next(row for name, row in rows.items() if name.startswith("bicubic"))
    ours, l2 = rows[PERCEPTUAL], rows[L2]
    gain, gain_l2 = (row["psnr"] - bicubic["psnr"] for row in (ours, l2))
    used, codes = of_all["codes_used"], of_all["codebook_size"]
    training = max(seconds[COMMON] + seconds[name] for name in (L2, PERCEPTUAL))
    return [
        {
            "aim": f"PSNR at least {TARGET_DB} dB over bicubic 8x reduction",
            "reached": f"{gain:+.2f} dB; trained on the squared error alone {gain_l2:+.2f} dB",
            "met": gain >= TARGET_DB,
        },
        {
            "aim": f"more than {TARGET_USED:.0%} of at least {TARGET_CODES:,} codes in use",
            "reached": f"{used:,} of {codes:,} on all photographs",
            "met": codes >= TARGET_CODES and used > TARGET_USED * codes,
        },
        {
            "aim": "perceptual distance below that of the squared error alone",
            "reached": f"{ours['perceptual']:.4f} against {l2['perceptual']:.4f} ({ours['perceptual_network']})",
            "met": ours["perceptual"] < l2["perceptual"],
        },
        {
            "aim": f"at most {TARGET_SECONDS // 60} minutes of training",
            "reached": duration(training),
            "met": training <= TARGET_SECONDS,
        },
    ]


def write_docs(found: dict[str, Any]) -> None:
    """results.json, curve.svg and grid.jpg in docs/tokenizer_proof; the tables in docs/tokenizer.md."""
    DOCS.mkdir(exist_ok=True)
    _replace(DOCS / "results.json", json.dumps(found, indent=1) + "\n")
    with Image.open(ROOT / "held_out" / f"grid_{SIZE}.png") as grid:
        # The PNG has several megabytes, too many for a repository.
        grid.convert("RGB").save(DOCS / "grid.jpg", quality=GRID_QUALITY)
    _save_curve(DOCS / "curve.svg")
    page = PAGE.read_text(encoding="utf-8")
    if BEGIN not in page or END not in page:
        raise InputError(f"{PAGE} has no line {BEGIN!r} or {END!r}: put both where the tables belong")
    before, rest = page.split(BEGIN)
    _replace(PAGE, "".join([before, BEGIN, "\n", "\n".join(_section(found)), "\n", END, rest.split(END)[1]]))


def _section(found: dict[str, Any]) -> list[str]:
    lines = ["", "| aim | reached | |", "|---|---|---|"]
    lines += [f"| {v['aim']} | {v['reached']} | {'yes' if v['met'] else 'no'} |" for v in found["verdicts"]]
    for title, name in (("held-out photographs", "held_out"), ("all photographs, held-out and trained on", "all")):
        rows = found[name]
        columns = [column for column in COLUMNS if any(column[0] in row for row in rows)]
        lines += ["", f"{rows[0]['samples']} {title}, the centred square at {SIZE} x {SIZE} pixels:", ""]
        lines += ["| " + " | ".join(title for _, title, _ in columns) + " |", "|---" * len(columns) + "|"]
        for row in rows:
            cells = (form.format(row[key]) if key in row else "" for key, _, form in columns)
            lines.append("| " + " | ".join(cells) + " |")
    threads = f"{found['training_threads']} in training, {found['threads']} in the evaluation"
    lines += ["", f"CPU threads: {threads}; torch {found['versions']['torch']}.", ""]
    return [*lines, "![loss over steps](tokenizer_proof/curve.svg)", "", "![held out](tokenizer_proof/grid.jpg)", ""]


def _save_curve(path: Path) -> None:
    """Squared error of each step, as a moving mean: the common part, and the two that go on from it."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    start = len(_steps(COMMON))
    for name in CONFIGS:
        losses = [record["loss_l2"] for record in _steps(name)]
        first = 0 if name == COMMON else start
        window = 25
        means = [sum(part) / len(part) for i in range(len(losses)) if (part := losses[max(0, i - window) : i + 1])]
        axes.plot(range(first + 1, first + 1 + len(means)), means, label=name)
    axes.set(xlabel="step", ylabel="squared error of the training crops", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")  # powers of ten would be set in fonts that not every machine has
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _steps(name: str) -> list[dict[str, Any]]:
    return [record for record in read_json_lines(ROOT / name / "metrics.jsonl") if "loss_l2" in record]


def _seconds(name: str) -> float:
    """Time of all steps, without evaluations and saving."""
    return sum(record["timing"]["step_seconds"] for record in _steps(name))


def _replace(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main(argv: list[str]) -> None:
    """Run the proof."""
    config = load(ProofConfig, argv, prog="tokenizer_proof.py")
    if not PAGE.exists():
        raise InputError(f"{Path.cwd()} is not the project's folder: run examples/tokenizer_proof.py from there")
    if config.fresh:
        for name in (*CONFIGS, "held_out", "all"):
            shutil.rmtree(ROOT / name, ignore_errors=True)
        (ROOT / "steps.json").unlink(missing_ok=True)
    run_all([[config.python, "examples/fetch_media.py", "--output", str(MEDIA)]])
    run_all(commands(config, step_counts(config)))
    found = results(config.num_threads or os.cpu_count() or 1)
    write_docs(found)
    for verdict in found["verdicts"]:
        print(f"{'reached' if verdict['met'] else 'MISSED '}  {verdict['aim']}: {verdict['reached']}")
    print(f"{PAGE}, {DOCS}/results.json, curve.svg, grid.jpg")


if __name__ == "__main__":
    run_program(main)

"""What happened in a run: `python tools/run_report.py --run RUN_DIR`

Prints a summary and writes RUN_DIR/report.html, one page that needs no other file: losses, gradient norm, throughput,
step times, starts and restarts, where the time went, events. It reads what the run wrote, also while it is running.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from megatron_ext.config import InputError, load, reason_of, run_program
from megatron_ext.config.run import RunConfig
from megatron_ext.config.section import Count, Name, Positive, Section
from megatron_ext.files import check_file, read_json_lines
from megatron_ext.observe.account import Account, Start, account_of, starts_of
from megatron_ext.observe.elements import Bar
from megatron_ext.observe.report import COLORS, Points, Report, curves, smooth
from megatron_ext.observe.writers import duration

POINTS = 2000
"""Points of a curve at most: more would not be seen, and make the page large."""

PERCENTILES = (50, 90, 99, 100)
TOLD = ("save_failed", "bad_step", "rewind", "hang", "divergence", "blend", "stop", "failure", "end")
"""Events of the page's table; every save would fill it."""


@dataclass(frozen=True, kw_only=True)
class RunReportConfig(Section):
    """Summarise a run in the terminal and as a page."""

    run: Name
    """The run folder."""

    output: Name | None = None
    """The page; null writes report.html into the run folder."""

    peak_tflops: Positive | None = None
    """Dense peak of one device in TFLOP/s, for the share of it that was used (MFU); null tells TFLOP/s only."""

    span: Count = 20
    """Steps over which curves are averaged; single steps stand behind them."""


@dataclass(frozen=True)
class Story:
    """All that a run folder tells."""

    training: list[dict[str, Any]]
    """Metrics of steps."""
    evaluation: list[dict[str, Any]]
    starts: list[Start]
    account: Account
    flops_per_token: float | None
    """None where the configuration names no decoder."""


def read_story(run: Path) -> Story:
    """Read a run folder.

    Raises:
        InputError: it holds no metrics or no events.
    """
    metrics = read_json_lines(run / "metrics.jsonl")
    training = [record for record in metrics if "loss" in record]
    starts = starts_of(run)
    if not starts or not training:
        raise InputError(f"run {str(run)!r} has no steps in metrics.jsonl and events.jsonl: give the folder of a run")
    evaluation = [record for record in metrics if "loss" not in record]
    return Story(training, evaluation, starts, account_of(starts, metrics), _flops_per_token(run / "config.yaml"))


def _flops_per_token(path: Path) -> float | None:
    from megatron_ext.plan import DecoderShape
    from megatron_ext.plan.flops import flops_per_token
    from megatron_ext.vocab import layout_of

    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "vocab" not in config:  # a vision tokenizer's
        return None
    try:
        config = load(RunConfig, ["--config", str(path)])
        size = layout_of(config.vocab).size
    except InputError:  # its text tokenizer, say, is not on this machine
        return None
    return flops_per_token(DecoderShape.of(config.model), config.train.seq_length, vocab_size=size)


def column(records: Sequence[dict[str, Any]], name: str, *, timing: bool = False) -> tuple[list[int], list[float]]:
    """Steps and values; a step without a value has none."""
    found = [(record["step"], (record.get("timing", {}) if timing else record).get(name)) for record in records]
    found = [(step, value) for step, value in found if value is not None]
    return [step for step, _ in found], [value for _, value in found]


def thinned(points: Points) -> Points:
    """At most POINTS of `points`, evenly spread, the last one among them. For drawing: of what is thinned, neither a
    mean of neighbours nor a percentile is that of the run."""
    x, y = points
    stride = max(1, -(-len(x) // POINTS))
    first = (len(x) - 1) % stride
    return x[first::stride], y[first::stride]


def percentiles(values: Sequence[float]) -> list[float]:
    """The PERCENTILES of `values`."""
    ordered = sorted(values)
    return [ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in PERCENTILES]


def facts_of(story: Story, config: RunReportConfig) -> dict[str, str]:
    """The run at a glance: label -> value."""
    last, account = story.training[-1], story.account
    rates = [record["timing"]["tokens_per_second"] for record in story.training if record.get("timing")]
    facts = {
        "steps": f"{last['step']:,}",
        "last loss": f"{last['loss']:.4g}" if last["loss"] is not None else "not finite",
        "starts": str(len(story.starts)),
        "from first to last sign": duration(account.elapsed),
        "goodput": f"{account.goodput:.1%}",
    }
    if "consumed_tokens" in last:
        facts["tokens"] = f"{last['consumed_tokens']:,}"
    if rates:
        facts["tokens/s, median"] = f"{statistics.median(rates):,.0f}"
    ranks = story.starts[-1].ranks
    if rates and ranks and story.flops_per_token:
        tflops = statistics.median(rates) * story.flops_per_token / ranks / 1e12
        facts["TFLOP/s a rank"] = f"{tflops:,.4g}"
        if config.peak_tflops:
            facts["MFU"] = f"{tflops / config.peak_tflops:.1%}"
    return facts


def start_rows(starts: Sequence[Start]) -> list[list[Any]]:
    """A row for each start."""
    return [
        [
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(start.began)),
            str(start.ranks or ""),
            f"{start.first_step:,} to {start.last_step:,}" if start.ready is not None else "none",
            start.forgotten,
            duration(start.ended - start.began),
            start.end,
        ]
        for start in starts
    ]


STARTS = ("began (UTC)", "ranks", "steps that count", "steps lost", "lived", "end")


def cause_rows(account: Account) -> list[list[str]]:
    """Cause, time, share."""
    return [[name, duration(seconds), f"{seconds / account.elapsed:.1%}"] for name, seconds in account.causes()]


def print_summary(story: Story, config: RunReportConfig, console: Console) -> None:
    """The page's tables in the terminal."""
    facts = Table.grid(padding=(0, 2))
    for label, value in facts_of(story, config).items():
        facts.add_row(label, value)
    times = Table("where the time went", "", "", box=None, header_style="bold")
    for row in cause_rows(story.account):
        times.add_row(*row)
    starts = Table(*STARTS, box=None, header_style="bold")
    for row in start_rows(story.starts):
        starts.add_row(*map(str, row))
    for part in (facts, times, starts):
        console.print(part)
        console.print()


def build_page(story: Story, config: RunReportConfig) -> Report:
    """The page, from top to bottom."""
    page = Report(Path(config.run).resolve().name, f"What {config.run} wrote of itself; times are of its own clock.")
    page.facts(facts_of(story, config))
    _add_losses(page, story, config)
    _add_speed(page, story, config)
    page.section("Starts", "What a start did after the checkpoint that the next one took up came again: lost steps.")
    page.table(STARTS, start_rows(story.starts))
    page.section("Where the time went", "From the first start to the last sign of life.")
    account = story.account
    parts = [(name, seconds, f"{seconds / account.elapsed:.0%}") for name, seconds in account.causes()]
    page.bars([Bar(label="", parts=parts)])
    page.table(("", "time", "share"), cause_rows(account))
    events = [event for start in story.starts for event in start.events if event["event"] in TOLD]
    page.section("Events", "" if events else "None but starts and saves.")
    if events:
        page.table(("time (UTC)", "event", "step", ""), [_event_row(event) for event in events])
    return page


def _add_losses(page: Report, story: Story, config: RunReportConfig) -> None:
    marks = {start.first_step: "restart" for start in story.starts[1:] if start.ready is not None}

    def figure(names: dict[str, str], y_label: str, caption: str, records: Sequence[dict[str, Any]], **style: Any):
        raw = {label: column(records, name) for label, name in names.items()}
        raw = {label: points for label, points in raw.items() if points[0]}
        if raw:
            smoothed = {label: thinned((x, smooth(y, config.span))) for label, (x, y) in raw.items()}
            raw = {label: thinned(points) for label, points in raw.items()}
            series = smoothed if records is story.training else raw
            page.figure(
                curves(series, faint=raw, marks=marks, x_label="optimizer step", y_label=y_label, **style), caption
            )

    page.section("Losses", "Dashed lines are restarts.")
    modalities = {"text": "loss_text", "vision": "loss_vision"}
    if not any(name in story.training[-1] for name in modalities.values()):
        modalities = {"loss": "loss"}
    figure(modalities, "loss", f"Mean of {config.span} steps, single steps behind.", story.training)
    datasets = sorted(name for name in story.training[-1] if name.startswith("loss_dataset/"))
    for first in range(0, len(datasets), len(COLORS)):
        named = {name.removeprefix("loss_dataset/"): name for name in datasets[first : first + len(COLORS)]}
        figure(named, "loss", "By dataset.", story.training)
    held_out = {"text": "valid_loss_text", "vision": "valid_loss_vision", "PSNR": "valid_psnr"}
    caption = "On data.valid; of a tokenizer on media.valid_inputs, or without them on the first of media.inputs."
    figure(held_out, "evaluation", caption, story.evaluation)
    figure({"gradient norm": "grad_norm"}, "gradient norm", "Before clipping.", story.training, log_y=True)
    groups = [name for name in story.training[-1] if name.startswith("grad_norm/")]
    named = {name.removeprefix("grad_norm/"): name for name in groups}
    figure(named, "gradient norm", "By kind of weight, before clipping.", story.training, log_y=True)


def _add_speed(page: Report, story: Story, config: RunReportConfig) -> None:
    steps, rates = column(story.training, "tokens_per_second", timing=True)
    if not steps:
        return
    page.section("Speed")
    page.figure(
        curves(
            {"tokens/s": thinned((steps, smooth(rates, config.span)))}, faint={"tokens/s": thinned((steps, rates))},
            x_label="optimizer step", y_label="tokens/s",
        ),
        "All ranks together, padding included.",
    )  # fmt: skip
    seconds = {name: column(story.training, f"{name}_seconds", timing=True)[1] for name in ("step", "data")}
    rows = [[name, *percentiles(values)] for name, values in seconds.items() if values]
    page.table(("seconds", *(f"{share} %" if share < 100 else "longest" for share in PERCENTILES)), rows)


def _event_row(event: dict[str, Any]) -> list[str]:
    known = ("event", "time", "step", "documents", "config", "provenance", "environment")
    rest = ", ".join(f"{name} {value}" for name, value in event.items() if name not in known)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event["time"]))
    return [when, event["event"], str(event.get("step", "")), reason_of(rest)]


def main(argv: list[str]) -> None:
    """Print the summary and write the page."""
    config = load(RunReportConfig, argv, prog="run_report.py")
    if config.output is not None:
        check_file(config.output, "output")
    story = read_story(Path(config.run))
    console = Console(highlight=False)
    print_summary(story, config, console)
    written = build_page(story, config).write(config.output or Path(config.run) / "report.html")
    console.print(f"wrote {written}", soft_wrap=True)


def cli() -> None:
    """Console script emu3-run-report."""
    run_program(main)


if __name__ == "__main__":
    run_program(main)

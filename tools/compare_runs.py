"""Whether two runs are equal, close, or where they part: `python tools/compare_runs.py A B [--tolerance 1e-4]`.

A and B are run folders (observe.run_dir). Exit code 0: equal in every logged field outside `timing`, or close;
1: parted; 2: nothing to compare.
"""

import dataclasses
import itertools
import json
import sys
from dataclasses import dataclass
from typing import Any

from megatron_ext.config import InputError, load, run_program
from megatron_ext.config.section import Name, NonNegative, Section
from megatron_ext.observe.compare import Comparison, History, Pair, compare
from megatron_ext.observe.writers import plain

_MOST_ROWS = 20


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Section):
    """Compare two runs: metrics, configuration, data, environment. The folders may stand first, without --a and --b."""

    a: Name
    """Folder of the first run."""

    b: Name
    """Folder of the second run."""

    tolerance: NonNegative = 1e-4
    """Largest relative difference of a metric up to which runs are close; whole numbers must be equal."""

    json: bool = False
    """Print everything that was found as JSON instead of the page; an infinite difference is null."""


def page(a: History, b: History, found: Comparison) -> list[str]:
    """What was found, for people."""
    lines = [_headline(found), "", *(_run_line(name, run) for name, run in (("A", a), ("B", b))), ""]
    lines += _metric_lines(found)
    for title, pairs in (
        ("configuration", found.config),
        ("data", found.data),
        ("environment", found.environment),
    ):
        lines += _pair_lines(title, pairs, known=title not in found.unknown)
    return lines


def _headline(found: Comparison) -> str:
    steps = f"steps {found.steps[0]:,} to {found.steps[-1]:,}"
    if found.verdict == "equal":
        return f"equal: {steps}, every field outside timing"
    if found.verdict == "close":
        largest = max((metric.largest for metric in found.metrics.values()), default=0.0)
        return f"close: {steps}, every metric within {largest:.1e} (tolerance {found.tolerance:.1e})"
    step = found.parted_at
    headline = f"parted at step {step:,}: "
    if step in found.missing:
        headline += f"{found.missing[step]} has no such step"
    else:
        name, metric = next((n, m) for n, m in found.metrics.items() if m.first_beyond == step)
        headline += f"{name} {_shown(metric.values_beyond[0])} and {_shown(metric.values_beyond[1])}"
    first = found.first_difference
    if first == found.steps[0]:
        return f"{headline}; they differ from the first step on"
    return f"{headline}; equal before step {first:,} (tolerance {found.tolerance:.1e})"


def _run_line(name: str, run: History) -> str:
    last = run.starts[-1] if run.starts else {}
    git = last.get("git") or {}
    facts = [
        f"{name}  {run.folder}",
        f"steps {min(run.metrics):,} to {max(run.metrics):,}",
        f"{len(run.starts)} starts" if run.starts else "no provenance",
    ]
    if last:
        facts.append(f"{last.get('ranks')} ranks")
    if git:
        facts.append(f"commit {git['commit'][:12]}{' with changes' if git['dirty'] else ''}")
    if run.tokens_per_second:
        facts.append(f"{run.tokens_per_second:,.0f} tokens/s")
    return ", ".join(facts)


def _metric_lines(found: Comparison) -> list[str]:
    equal = [name for name, metric in found.metrics.items() if metric.first_difference is None]
    apart = {name: metric for name, metric in found.metrics.items() if metric.first_difference is not None}
    lines = []
    if apart:
        rows = [("metric", "largest", "at step", "A", "B", "differs from", "beyond from")]
        for name, metric in apart.items():
            beyond = "" if metric.first_beyond is None else f"{metric.first_beyond:,}"
            rows.append((name, f"{metric.largest:.1e}", f"{metric.step:,}", *map(_shown, metric.values),
                         f"{metric.first_difference:,}", beyond))  # fmt: skip
        lines += _table(rows)
    if equal:
        lines.append(f"  equal at every step: {', '.join(equal)}")
    for side in "AB":
        if names := [name for name, owner in found.one_sided.items() if owner == side]:
            lines.append(f"  only in {side}: {', '.join(names)}")
        if steps := [step for step, lacking in found.missing.items() if lacking == side]:
            lines.append(f"  {side} lacks {len(steps):,} steps, the first is {steps[0]:,}")
    return lines


def _pair_lines(title: str, pairs: dict[str, Pair], *, known: bool) -> list[str]:
    if not pairs:
        return ["", f"{title}: {'the same' if known else 'unknown, a run has no provenance.json that tells'}"]
    rows = [("", "A", "B"), *((name, *map(_shown, pair)) for name, pair in itertools.islice(pairs.items(), _MOST_ROWS))]
    more = [f"  and {len(pairs) - _MOST_ROWS} more (--json true)"] if len(pairs) > _MOST_ROWS else []
    return ["", f"{title}: {len(pairs)} different", *_table(rows), *more]


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _shown(value: Any) -> str:
    text = f"{value:.7g}" if isinstance(value, float) else "-" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:18]}...{text[-18:]}"


def main(argv: list[str]) -> None:
    """Print the comparison that `argv` asks for."""
    folders = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    if len(folders) > 2:
        raise InputError(f"{len(folders)} folders were given, {' '.join(folders)}: give two")
    named = [f"--{name}={folder}" for name, folder in zip("ab", folders, strict=False)]
    config = load(CompareConfig, [*named, *argv[len(folders) :]], prog="compare_runs.py")
    a, b = History.read(config.a), History.read(config.b)
    found = compare(a, b, config.tolerance)
    if config.json:
        content = {"verdict": found.verdict, "parted_at": found.parted_at, **dataclasses.asdict(found)}
        print(json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        print("\n".join(page(a, b, found)))
    if found.verdict == "parted":
        sys.exit(1)


def cli() -> None:
    """Console script emu3-compare-runs."""
    run_program(main)


if __name__ == "__main__":
    cli()

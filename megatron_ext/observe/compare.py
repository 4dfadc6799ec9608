"""Two runs side by side: whether they logged the same, how far apart they are, and what was different about them."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.config import InputError
from megatron_ext.files import read_json_lines
from megatron_ext.observe.provenance import read_provenance

Pair = tuple[Any, Any]
"""What the first and the second run have."""

EXPECTED_TO_DIFFER = ("observe.run_dir",)
"""Configuration fields whose difference says nothing."""

IDENTITIES = ("data", "vocabulary", "vision_tokenizer")
"""What names the data of a run; the first is the sequence of windows."""


@dataclass(frozen=True)
class History:
    """What a run folder holds."""

    folder: Path
    metrics: dict[int, dict[str, Any]]
    """Step -> everything logged for it outside `timing`, training and evaluation together."""
    tokens_per_second: float | None
    """Median over the steps."""
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    """Entries of provenance.json."""

    @classmethod
    def read(cls, folder: str | Path) -> "History":
        """Raises InputError: no run folder, or one without metrics."""
        folder = Path(folder)
        records = read_json_lines(folder / "metrics.jsonl")
        if not records:
            raise InputError(f"{folder} has no metrics.jsonl with a line: give the observe.run_dir of a run")
        metrics: dict[int, dict[str, Any]] = {}
        for record in records:
            logged = {name: value for name, value in record.items() if name not in ("step", "timing")}
            metrics.setdefault(record["step"], {}).update(logged)
        rates = [rate for record in records if (rate := record.get("timing", {}).get("tokens_per_second"))]
        config = folder / "config.yaml"
        return cls(
            folder,
            metrics,
            statistics.median(rates) if rates else None,
            yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {},
            read_provenance(folder),
        )


@dataclass
class Metric:
    """How far one field of metrics.jsonl is apart."""

    largest: float = 0.0
    """Largest |a - b| / max(|a|, |b|); infinite where only one is a number, or whole numbers differ."""
    step: int | None = None
    """Where that is; None where all are equal."""
    values: Pair | None = None
    """Both values there."""
    first_difference: int | None = None
    """First step at which it differs at all."""
    first_beyond: int | None = None
    """First step at which it differs by more than the tolerance."""
    values_beyond: Pair | None = None

    def add(self, step: int, values: Pair, tolerance: float) -> None:
        """Take in one step; steps come in order."""
        difference = relative_difference(*values)
        if difference == 0:
            return
        if self.first_difference is None:
            self.first_difference = step
        if difference > self.largest:
            self.largest, self.step, self.values = difference, step, values
        if difference > tolerance and self.first_beyond is None:
            self.first_beyond, self.values_beyond = step, values


@dataclass
class Comparison:
    """What `compare` found."""

    tolerance: float
    steps: list[int]
    """Steps that both runs logged."""
    missing: dict[int, str]
    """Step that only one run logged, though both went on after it -> `A` or `B`, which lacks it."""
    metrics: dict[str, Metric]
    one_sided: dict[str, str]
    """Field that only one run ever logs -> `A` or `B`, which has it."""
    config: dict[str, Pair]
    """Fields of the configuration that differ; the run folder's own name is left out."""
    data: dict[str, Pair]
    """What identifies the data and differs."""
    environment: dict[str, Pair]
    """Code, packages and machine, where they differ."""
    unknown: list[str] = field(default_factory=list)
    """What could not be compared, because a run does not say."""

    @property
    def parted_at(self) -> int | None:
        """First step at which the runs are not the same within the tolerance."""
        steps = [metric.first_beyond for metric in self.metrics.values() if metric.first_beyond is not None]
        return min([*steps, *self.missing], default=None)

    @property
    def first_difference(self) -> int | None:
        """First step at which a field differs at all."""
        steps = [metric.first_difference for metric in self.metrics.values() if metric.first_difference is not None]
        return min([*steps, *self.missing], default=None)

    @property
    def verdict(self) -> str:
        """`equal`: every field outside `timing`; `close`: within the tolerance; or `parted`."""
        if self.parted_at is not None:
            return "parted"
        return "equal" if self.first_difference is None and not self.one_sided else "close"


def relative_difference(a: Any, b: Any) -> float:
    """|a - b| / max(|a|, |b|) of two floats. Whole numbers, texts and null (NaN) are equal or infinitely far apart."""
    if a == b:
        return 0.0
    if not (isinstance(a, float) or isinstance(b, float)) or not all(isinstance(x, int | float) for x in (a, b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def compare(a: History, b: History, tolerance: float) -> Comparison:
    """Compare two runs step by step, and what shaped them.

    Raises:
        InputError: they have no step in common.
    """
    steps = sorted(a.metrics.keys() & b.metrics.keys())
    if not steps:
        raise InputError(f"{a.folder} and {b.folder} have no step in common: there is nothing to compare")
    inside = range(steps[0], min(max(a.metrics), max(b.metrics)) + 1)
    missing = {
        step: "B" if step in a.metrics else "A" for step in a.metrics.keys() ^ b.metrics.keys() if step in inside
    }
    names = [{name for record in run.metrics.values() for name in record} for run in (a, b)]
    metrics = {name: Metric() for name in sorted(names[0] & names[1])}
    for step in steps:
        for name, metric in metrics.items():
            if name in a.metrics[step] and name in b.metrics[step]:
                metric.add(step, (a.metrics[step][name], b.metrics[step][name]), tolerance)
    last_starts = [run.starts[-1] if run.starts else {} for run in (a, b)]
    data = [_data_of(start) for start in last_starts]
    if all(data) and data[0]["data"] == data[1]["data"]:  # the same windows: where they lie does not matter
        data = [{name: value for name, value in facts.items() if name in IDENTITIES} for facts in data]
    config = differences(flat(a.config), flat(b.config))
    return Comparison(
        tolerance=tolerance,
        steps=steps,
        missing=dict(sorted(missing.items())),
        metrics=metrics,
        one_sided={name: "A" if name in names[0] else "B" for name in sorted(names[0] ^ names[1])},
        config={name: pair for name, pair in config.items() if name not in EXPECTED_TO_DIFFER},
        data=differences(*data) if all(data) else {},
        environment=differences(*(_environment_of(start) for start in last_starts)) if all(last_starts) else {},
        unknown=[
            what
            for what, known in (("data", all(data)), ("environment", all(last_starts)))
            if not known
        ],
    )  # fmt: skip


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of nested mappings and lists."""
    if isinstance(value, Mapping) or (isinstance(value, list) and value):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        found: dict[str, Any] = {}
        for name, item in items:
            found |= flat(item, f"{prefix}{name}.")
        return found
    return {prefix.removesuffix("."): value}


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Pair]:
    """Where two flat mappings differ; what one of them lacks counts as None."""
    names = [*a, *(name for name in b if name not in a)]
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


def _data_of(start: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies the data of a start: the sequence of windows, the vision tokenizer, the manifests by name."""
    identities = start.get("identities", {})
    if "data" not in identities:
        return {}
    manifests = {f"manifest {Path(prefix).name}": digest for prefix, digest in start.get("manifests", {}).items()}
    return {name: identities.get(name) for name in IDENTITIES} | manifests


def _environment_of(start: Mapping[str, Any]) -> dict[str, Any]:
    return flat({name: start.get(name) for name in ("ranks", "git", "python", "packages", "hardware")})

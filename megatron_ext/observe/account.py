"""Where a run's time went: its starts, what each did, and what was lost between them.

Everything is read from events.jsonl (when things happened) and metrics.jsonl (how long steps took). Metrics hold the
steps that count; those that a start did after the checkpoint it left come again, and their time is lost.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.files import read_json_lines


@dataclass(kw_only=True)
class Start:
    """One start of a run."""

    began: float
    """Seconds since 1970."""
    ranks: int | None
    first_step: int = 0
    """Steps that were done when it went on."""
    last_step: int = 0
    """Last of its steps that count."""
    forgotten: int = 0
    """Steps after that one, which came again."""
    ready: float | None = None
    """When it went on from its checkpoint; None where it never came so far."""
    ended: float = 0.0
    """Its last sign of life."""
    end: str = "no end was logged: killed, or still running"
    events: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Account:
    """Seconds of a run by what they were for. They add up to `elapsed`."""

    elapsed: float
    training: float
    """Steps that count."""
    evaluation: float
    saving: float
    """While training stood still for checkpoints."""
    starting: float
    """From each start to where it went on: processes, data, weights."""
    steps_done_again: float
    """Steps after the checkpoint that the next start took up, at the median of the steps that count."""
    other: float
    """Waiting for the last save, the step a kill cut short, and whatever else a start did that left no trace."""
    down: float
    """Between the end of a start and the next one."""

    @property
    def goodput(self) -> float:
        """Share of the time that went into steps that count."""
        return self.training / self.elapsed if self.elapsed else 0.0

    def causes(self) -> list[tuple[str, float]]:
        """Name and seconds of each, the largest first."""
        parts = dataclasses.asdict(self)
        del parts["elapsed"]
        named = ((name.replace("_", " "), seconds) for name, seconds in parts.items())
        return sorted(named, key=lambda item: -item[1])


ENDINGS = {
    "end": lambda event: "stopped",
    "stop": lambda event: f"stopped: {event['reason']}",
    "failure": lambda event: f"failed: {event['error']}",
    "hang": lambda event: f"hung: {event['activity']}",
    "divergence": lambda event: f"replicas differ: {', '.join(event['found'][:3])}",
}
"""How a start ended, by kind of event; the first of a start says most."""


def starts_of(run_dir: str | Path) -> list[Start]:
    """The starts of a run, in order."""
    starts: list[Start] = []
    in_queue = False
    for event in read_json_lines(Path(run_dir) / "events.jsonl"):
        if event["event"] == "start":
            starts.append(Start(began=event["time"], ranks=(event.get("environment") or {}).get("world_size")))
        # A job's own notes, between the end of a start and the next one, are no signs of the first one's life.
        in_queue = event["event"] in ("job_end", "job_start") or (in_queue and event["event"] != "start")
        if not starts or in_queue:
            continue
        start = starts[-1]
        start.events.append(event)
        start.ended = max(start.ended, event["time"])
        if event["event"] == "resume":
            start.ready = event["time"]
            start.first_step = start.last_step = event["step"]
            _close_previous(starts[:-1], event)
        elif event["event"] == "end" and event["finished"]:
            start.end = "finished"
        elif event["event"] in ENDINGS and not any(other["event"] in ENDINGS for other in start.events[:-1]):
            start.end = ENDINGS[event["event"]](event)
    if starts and starts[-1].ready is not None:
        steps = (record["step"] for record in read_json_lines(Path(run_dir) / "metrics.jsonl"))
        starts[-1].last_step = max(steps, default=starts[-1].first_step)
    return starts


def _close_previous(starts: list[Start], resume: dict[str, Any]) -> None:
    """What only the next start knows of the last one that trained: which of its steps count, how long it lived."""
    trained = [start for start in starts if start.ready is not None]
    if trained:
        trained[-1].last_step = max(trained[-1].first_step, resume["step"])
        trained[-1].forgotten = resume.get("forgotten_steps", 0)
        trained[-1].ended = max(trained[-1].ended, resume.get("last_metrics") or 0.0)


def account_of(starts: Sequence[Start], metrics: Sequence[dict[str, Any]]) -> Account:
    """Where the time of a run went, from its first start to its last sign of life."""
    if not starts:
        return Account(elapsed=0, training=0, evaluation=0, saving=0, starting=0, steps_done_again=0, other=0, down=0)
    timing = [record.get("timing", {}) for record in metrics]
    training = sum(entry.get("step_seconds", 0.0) for entry in timing)
    evaluation = sum(entry.get("eval_seconds", 0.0) for entry in timing)
    saving = sum(event.get("blocked_seconds", 0.0) for event in _all(starts) if event["event"] == "save")
    starting = sum(start.ready - start.began for start in starts if start.ready is not None)
    alive = sum(start.ended - start.began for start in starts)
    elapsed = starts[-1].ended - starts[0].began
    untold = max(0.0, alive - training - evaluation - saving - starting)
    steps = [entry["step_seconds"] for entry in timing if "step_seconds" in entry]
    again = sum(start.forgotten for start in starts) * (statistics.median(steps) if steps else 0.0)
    again = min(again, untold)
    return Account(
        elapsed=elapsed,
        training=training,
        evaluation=evaluation,
        saving=saving,
        starting=starting,
        steps_done_again=again,
        other=untold - again,
        down=max(0.0, elapsed - training - evaluation - saving - starting - untold),
    )


def _all(starts: Sequence[Start]) -> Iterator[dict[str, Any]]:
    for start in starts:
        yield from start.events

"""The starts and ends of a job, as lines `job_start` and `job_end` of RUN_DIR/events.jsonl, and what an end means."""

import functools
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import latest_checkpoint, read_metadata
from megatron_ext.files import alone_in, read_json_lines

EVENTS = "events.jsonl"
STOP_FILE = "stop"
"""The file that resilience/stopping.py looks for. A job writes its reason into it, `touch` leaves it empty."""

PATIENCE_S = 300.0
"""For the lock of a start on a node that has died: network file systems keep it for a while (Linux's nfsd: 90 s)."""


class Outcome(Enum):
    """What happens to a job that has ended."""

    OVER = "over"
    AGAIN = "again"
    """Back into the queue."""
    GIVEN_UP = "given up"


@dataclass(frozen=True, kw_only=True)
class End:
    """How a job ended."""

    outcome: Outcome
    cause: str
    """finished, ended by Slurm, time limit, preemption, stopped or failed."""

    step: int
    """Last optimizer step that was done."""

    message: str
    """One line for the user."""


def begin(run_folder: Path, job: str, restart: int, nodes: str) -> int:
    """Note that job number `job` starts on `nodes`, for the `restart`-th time again; returns the checkpoint's step.

    A stop file that an earlier start left for itself, and did not live to obey, is removed.

    Raises:
        InputError: another job trains in the folder; nothing has been touched.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    say = functools.partial(print, file=sys.stderr, flush=True)  # the script reads what is printed
    with alone_in(run_folder / EVENTS, say, PATIENCE_S):
        _take_back_stop(run_folder)
        saved = saved_step(run_folder)
        note(run_folder, "job_start", job=job, restart=restart, nodes=nodes, step=saved)
    return saved


def end(run_folder: Path, train_steps: int, *, exit_code: int, time_limit: bool, state: str) -> End:
    """Judge, and note, the end of a job's programs.

    `state` is what `scontrol show job` says of the job; `time_limit`: the job was told that its time is nearly over.
    A job that somebody else has ended, by scancel or to run it again, is left to them. Of the others one that did not
    come to its last step goes back into the queue, unless a user asked the run to stop, or the run failed, or used up
    its time, at the step at which it did so before.
    """
    _take_back_stop(run_folder)
    step, saved = reached_step(run_folder), saved_step(run_folder)
    events = read_events(run_folder)
    previous = next((event for event in reversed(events) if event["event"] == "job_end"), {})
    told = _told(events)
    if exit_code == 0 and saved >= train_steps:
        cause = "finished"
    elif state and "JobState=RUNNING" not in state:
        cause = "ended by Slurm"
    elif time_limit:
        cause = "time limit"
    elif re.search(r"PreemptTime=\d", state):
        cause = "preemption"
    else:
        cause = "failed" if exit_code and told.get("event") != "stop" else "stopped"
    stuck = cause in ("failed", "time limit") and (previous.get("cause"), previous.get("step")) == (cause, step)
    if cause in ("finished", "ended by Slurm", "stopped"):
        outcome = Outcome.OVER
    else:
        outcome = Outcome.GIVEN_UP if stuck else Outcome.AGAIN
    reason = cause
    if cause in ("failed", "stopped"):
        reason = told.get("error") or told.get("reason") or told.get("event") or f"exit code {exit_code}"
    message = _message(outcome, cause, reason, f"step {step} of {train_steps}", saved)
    found = End(outcome=outcome, cause=cause, step=step, message=message)
    note(run_folder, "job_end", cause=cause, outcome=outcome.value, step=step, exit_code=exit_code, reason=reason)
    return found


def _take_back_stop(run_folder: Path) -> None:
    """Remove the job's own stop file, where the run has not: the next start is not to obey it."""
    stop = run_folder / STOP_FILE
    if stop.exists() and stop.stat().st_size:
        stop.unlink()


def saved_step(run_folder: Path) -> int:
    """Step of the newest checkpoint; 0 without one."""
    folder = latest_checkpoint(run_folder / "checkpoints")
    return 0 if folder is None else read_metadata(folder)["step"]


def reached_step(run_folder: Path) -> int:
    """Last step that metrics.jsonl or a checkpoint has."""
    steps = [line["step"] for line in read_json_lines(run_folder / "metrics.jsonl")[-1:]]
    return max([saved_step(run_folder), *steps])


def read_events(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of events.jsonl."""
    return read_json_lines(run_folder / EVENTS)


def _told(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The event with which the run itself said last, since the job's start, why it ends; empty where it did not."""
    for event in reversed(events):
        if event["event"] == "job_start":
            break
        if event["event"] in ("failure", "stop", "hang", "divergence"):
            return event
    return {}


def _message(outcome: Outcome, cause: str, reason: str, reached: str, saved: int) -> str:
    kept = f"the checkpoint of step {saved}" if saved else "the beginning"
    if cause == "finished":
        return f"finished: {reached}"
    if cause == "ended by Slurm":  # by a user's scancel, or to run it again
        return f"{cause} at {reached}: left to it, to go on from {kept}"
    if outcome is Outcome.AGAIN:
        return f"{reason} at {reached}: back into the queue, to go on from {kept}"
    if outcome is Outcome.GIVEN_UP:
        return f"{reason} at {reached}, where it ended before: not started again; submit it to go on from {kept}"
    return f"{reason} at {reached}: not started again; submit it to go on from {kept}"


def note(run_folder: Path, event: str, **fields: Any) -> None:
    """One line of events.jsonl, while no run writes there; a last line that a kill cut short is removed first."""
    path = run_folder / EVENTS
    run_folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": event, "time": round(time.time(), 3), **fields}, ensure_ascii=False) + "\n")

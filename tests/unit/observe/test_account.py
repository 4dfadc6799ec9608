"""Where the time of a run went, by hand."""

import json
import os
from pathlib import Path

import pytest

from megatron_ext.files import read_json_lines
from megatron_ext.observe.account import account_of, starts_of


def write_run(folder: Path) -> Path:
    """A run of three starts: stopped after 2 steps, killed two steps after the checkpoint of step 3, finished."""
    start = {"event": "start", "environment": {"world_size": 2}}
    events = [
        start | {"time": 100.0},
        {"event": "resume", "time": 110.0, "step": 0},
        {"event": "stop", "time": 131.0, "step": 2, "reason": "file stop"},
        {"event": "save", "time": 132.0, "step": 2, "blocked_seconds": 1.0},
        {"event": "end", "time": 132.0, "step": 2, "finished": False},
        {"event": "job_end", "time": 140.0, "step": 2, "cause": "time limit", "outcome": "again"},
        {"event": "job_start", "time": 190.0, "job": "1", "restart": 1, "nodes": "n[1-2]", "step": 2},
        {"event": "failure", "time": 195.0, "error": "preflight: n1 (rank 0): its clock is +7.0 s off"},
        start | {"time": 200.0},
        {"event": "resume", "time": 205.0, "step": 2, "forgotten_steps": 0, "last_metrics": 130.0},
        {"event": "save", "time": 217.0, "step": 3, "blocked_seconds": 2.0},
        start | {"time": 300.0},
        {"event": "failure", "time": 301.0, "error": "InputError: no such file"},
        start | {"time": 400.0},
        {"event": "resume", "time": 404.0, "step": 3, "forgotten_steps": 2, "last_metrics": 240.0},
        {"event": "save", "time": 426.0, "step": 5, "blocked_seconds": 1.0},
        {"event": "end", "time": 426.0, "step": 5, "finished": True},
    ]
    metrics = [{"step": step, "loss": 1.0, "timing": {"step_seconds": 10.0}} for step in range(1, 6)]
    metrics.append({"step": 5, "valid_loss": 1.0, "timing": {"eval_seconds": 0.5}})
    for name, records in (("events", events), ("metrics", metrics)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_starts(tmp_path):
    first, killed, refused, last = starts_of(write_run(tmp_path))
    assert (first.first_step, first.last_step, first.end) == (0, 2, "stopped: file stop")
    assert (killed.first_step, killed.last_step, killed.forgotten) == (2, 3, 2)
    assert killed.ended == 240.0 and killed.end.startswith("no end was logged")
    assert refused.ready is None and refused.end == "failed: InputError: no such file"
    assert (last.first_step, last.last_step, last.end, last.ranks) == (3, 5, "finished", 2)


def test_every_second_has_a_cause(tmp_path):
    run = write_run(tmp_path)
    account = account_of(starts_of(run), read_json_lines(run / "metrics.jsonl"))
    assert account.elapsed == 326.0
    assert (account.training, account.evaluation, account.saving) == (50.0, 0.5, 4.0)
    assert account.starting == 10.0 + 5.0 + 4.0
    # Alive 32 + 40 + 1 + 26 seconds: of them 50.5 + 4 + 19 are told, 20 are the killed start's last two steps.
    assert account.steps_done_again == 20.0  # two steps of 10 seconds
    assert account.other == pytest.approx(99 - 73.5 - 20)
    assert account.down == pytest.approx(326 - 99)
    assert sum(seconds for _, seconds in account.causes()) == pytest.approx(account.elapsed)
    assert account.goodput == pytest.approx(50 / 326)


def test_a_resume_tells_what_it_forgets(tmp_path):
    from megatron_ext.config.observe import ObserveConfig
    from megatron_ext.observe import Run

    section = ObserveConfig(run_dir=str(tmp_path), tensorboard=False)
    with Run.open(section, True, "{}\n") as run:
        run.truncate_after(0)
        for step in (1, 2, 3):
            run.log_metrics({"step": step, "loss": 1.0})
    os.utime(tmp_path / "metrics.jsonl", (1000.0, 1000.0))
    with Run.open(section, True, "{}\n") as run:
        run.truncate_after(1)
    resume = [event for event in read_json_lines(tmp_path / "events.jsonl") if event["event"] == "resume"][-1]
    assert (resume["step"], resume["forgotten_steps"], resume["last_metrics"]) == (1, 2, 1000.0)

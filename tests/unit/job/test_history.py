"""Whether a job that has ended goes back into the queue, and why."""

import json
from pathlib import Path

import pytest

from megatron_ext.checkpoint import CheckpointStore
from megatron_ext.config import InputError
from megatron_ext.files import alone_in
from megatron_ext.job import begin, end, history
from megatron_ext.job.history import Outcome, note, read_events

RUNNING = "JobId=1 JobState=RUNNING Reason=None PreemptTime=None"
PREEMPTED = "JobId=1 JobState=RUNNING Reason=None PreemptTime=2026-11-22T05:35:42"
CANCELLED = "JobId=1 JobState=COMPLETING Reason=None PreemptTime=None"


def reach(folder: Path, step: int, *, save: bool = False) -> None:
    """Leave what a run leaves that has come to `step`."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")
    if save:
        CheckpointStore(folder / "checkpoints", keep=1).write(step, lambda path: None, {})


def close(folder: Path, exit_code: int = 0, *, time_limit: bool = False, state: str = RUNNING):
    return end(folder, 10, exit_code=exit_code, time_limit=time_limit, state=state)


@pytest.mark.parametrize(
    ("step", "exit_code", "time_limit", "state", "cause", "outcome"),
    [
        (10, 0, False, RUNNING, "finished", Outcome.OVER),
        (10, 0, True, PREEMPTED, "finished", Outcome.OVER),
        (7, 0, True, RUNNING, "time limit", Outcome.AGAIN),
        (7, 0, False, PREEMPTED, "preemption", Outcome.AGAIN),
        (7, 1, False, RUNNING, "failed", Outcome.AGAIN),
        (7, 0, False, RUNNING, "stopped", Outcome.OVER),
        (7, 143, False, PREEMPTED, "preemption", Outcome.AGAIN),
        (7, 1, True, CANCELLED, "ended by Slurm", Outcome.OVER),
        (10, 1, False, RUNNING, "failed", Outcome.AGAIN),  # a run is finished when it says so
        (7, 0, True, "", "time limit", Outcome.AGAIN),  # slurmctld did not answer
    ],
)
def test_one_end(tmp_path, step, exit_code, time_limit, state, cause, outcome):
    begin(tmp_path, "1", 0, "n1")
    reach(tmp_path, step, save=True)
    found = close(tmp_path, exit_code, time_limit=time_limit, state=state)
    assert (found.cause, found.outcome, found.step) == (cause, outcome, step)
    assert read_events(tmp_path)[-1]["cause"] == cause and f"step {step} of 10" in found.message


def test_the_second_failure_at_a_step_is_the_last(tmp_path):
    for step, outcome in ((4, Outcome.AGAIN), (6, Outcome.AGAIN), (6, Outcome.GIVEN_UP)):
        begin(tmp_path, "1", 0, "n1")
        reach(tmp_path, step)
        note(tmp_path, "failure", error="InputError: a bad batch")
        found = close(tmp_path, 1)
        assert found.outcome is outcome and "InputError: a bad batch" in found.message
    assert "where it ended before" in found.message and "from the beginning" in found.message


def test_a_program_that_stops_on_a_signal_and_says_so_by_its_exit_code(tmp_path):
    begin(tmp_path, "1", 0, "n1")
    reach(tmp_path, 4, save=True)
    note(tmp_path, "stop", step=4, reason="SIGTERM")
    found = close(tmp_path, 1)
    assert (found.cause, found.outcome) == ("stopped", Outcome.OVER) and found.message.startswith("SIGTERM at step 4")


def test_a_step_that_was_reached_once_and_preempted_in_between(tmp_path):
    causes = [(1, RUNNING), (0, PREEMPTED), (1, RUNNING)]
    for exit_code, state in causes:
        begin(tmp_path, "1", 0, "n1")
        reach(tmp_path, 4)
        assert close(tmp_path, exit_code, state=state).outcome is Outcome.AGAIN


def test_a_time_limit_too_short_for_one_step(tmp_path):
    outcomes = []
    for _ in range(2):
        begin(tmp_path, "1", 0, "n1")
        outcomes.append(close(tmp_path, 0, time_limit=True).outcome)
    assert outcomes == [Outcome.AGAIN, Outcome.GIVEN_UP]


def test_begin_reports_the_checkpoint_and_removes_only_the_job_s_own_stop_file(tmp_path):
    tmp_path.joinpath("stop").write_text("the time limit of job 1\n")
    reach(tmp_path, 4, save=True)
    reach(tmp_path, 6)
    assert begin(tmp_path, "1", 1, "n[1-2]") == 4 and not (tmp_path / "stop").exists()
    (tmp_path / "stop").touch()
    begin(tmp_path, "1", 2, "n[1-2]")
    assert (tmp_path / "stop").exists(), "a user's wish"
    [first, second] = read_events(tmp_path)
    assert (first["restart"], first["step"], first["nodes"], second["restart"]) == (1, 4, "n[1-2]", 2)


def test_a_torn_line_of_a_killed_run_does_not_spoil_the_next(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n{"event": "sa')
    begin(tmp_path, "1", 1, "n1")
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "job_start"]


def test_a_job_leaves_the_run_of_another_alone(tmp_path, monkeypatch):
    """The same run submitted twice: the second is refused before it has touched what the first one reads."""
    monkeypatch.setattr(history, "PATIENCE_S", 0.2)
    begin(tmp_path, "1", 0, "n1")
    (tmp_path / "stop").write_text("the time limit of job 1")
    with alone_in(tmp_path / "events.jsonl", print), pytest.raises(InputError, match="is in use"):
        begin(tmp_path, "2", 0, "n2")
    assert (tmp_path / "stop").exists() and [event["job"] for event in read_events(tmp_path)] == ["1"]
    begin(tmp_path, "2", 0, "n2")
    assert not (tmp_path / "stop").exists()


def test_a_key_may_hold_what_some_call_the_end_of_a_line(tmp_path):
    note(tmp_path, "bad_step", keys=["one\u2028two\x85three"])
    assert read_events(tmp_path)[0]["keys"] == ["one\u2028two\x85three"]

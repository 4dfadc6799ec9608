"""The run folder: lines that survive a kill, a resume that leaves one line per step, ranks that stay silent."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from megatron_ext.config import InputError
from megatron_ext.config.observe import ObserveConfig
from megatron_ext.files import read_json_lines
from megatron_ext.observe import Run
from megatron_ext.observe.writers import ConsoleLines, JsonLines, counted, duration
from tests.support.full_disk import no_file_beyond

CONFIG = "train:\n  train_steps: 4\n"


def line(step: int, loss: float = 1.0) -> dict:
    return {"step": step, "loss": loss, "timing": {"tokens_per_second": 100.0}}


def test_run_folder(tmp_path):
    observe = ObserveConfig(run_dir=str(tmp_path / "run"), log_interval=1)
    with Run.open(observe, True, CONFIG, total_steps=4) as run:
        run.truncate_after(0)
        run.log_metrics(line(1))
        run.log_metrics({"step": 1, "valid_loss": 2.0})
        # Flushed: another process sees the line while the run is still open.
        assert [record["step"] for record in read_json_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 1]
        run.log_event("save", step=1)
    assert (tmp_path / "run" / "config.yaml").read_text() == CONFIG
    events = read_json_lines(tmp_path / "run" / "events.jsonl")
    assert [event["event"] for event in events] == ["start", "resume", "save"]
    assert events[0]["config"] == {"train": {"train_steps": 4}}


def test_resume_cuts_the_steps_that_come_again(tmp_path):
    observe = ObserveConfig(run_dir=str(tmp_path), tensorboard=False)
    with Run.open(observe, True, CONFIG) as run:
        for step in (1, 2, 3):
            run.log_metrics(line(step, loss=9.0))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    with Run.open(observe, True, CONFIG) as run:
        run.truncate_after(2)
        run.log_metrics(line(3, loss=1.0))
    records = read_json_lines(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in records] == [(1, 9.0), (2, 9.0), (3, 1.0)]


def test_tensorboard_shows_one_curve_over_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    observe = ObserveConfig(run_dir=str(tmp_path))
    with Run.open(observe, True, CONFIG) as run:
        for step in (1, 2, 3):
            run.log_metrics(line(step, loss=9.0))
    with Run.open(observe, True, CONFIG) as run:
        run.truncate_after(1)
        run.log_metrics(line(2, loss=1.0))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 9.0), (2, 1.0)]
    assert [event.step for event in events.Scalars("timing/tokens_per_second")] == [1, 2]


def test_a_rank_that_is_not_main_writes_nothing(tmp_path, capsys):
    observe = ObserveConfig(run_dir=str(tmp_path / "run"), log_interval=1)
    with Run.open(observe, False, CONFIG) as run:
        run.truncate_after(0)
        run.log_metrics(line(1))
        run.log_event("save")
        run.console.print("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_a_failure_is_an_event(tmp_path):
    observe = ObserveConfig(run_dir=str(tmp_path), tensorboard=False)
    with pytest.raises(RuntimeError), Run.open(observe, True, CONFIG):
        raise RuntimeError("loss is not finite")
    assert read_json_lines(tmp_path / "events.jsonl")[-1]["error"] == "RuntimeError: loss is not finite"


def test_a_full_disk_ends_a_run_with_one_line_and_the_lines_before_stay(tmp_path):
    observe = ObserveConfig(run_dir=str(tmp_path), tensorboard=False)
    with pytest.raises(InputError, match=f"observe.run_dir: cannot write {tmp_path} .File too large.: make room"):
        with contextlib.ExitStack() as disk, Run.open(observe, True, CONFIG) as run:
            run.log_metrics(line(1))
            disk.enter_context(no_file_beyond(0))  # stays full while the run is closed
            run.log_metrics(line(2))
    assert [record["step"] for record in read_json_lines(tmp_path / "metrics.jsonl")] == [1]


def test_lines_are_valid_json(tmp_path):
    lines = JsonLines(tmp_path / "x.jsonl")
    lines.write({"a": float("nan"), "b": torch.tensor(2.5), "c": np.float32(3), "d": [np.int64(4), float("inf")]})
    lines.close()
    text = (tmp_path / "x.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": 2.5, "c": 3.0, "d": [4, None]}


def test_console_lines(monkeypatch):
    clock = iter(float(second) for second in range(0, 1000, 2))
    monkeypatch.setattr("megatron_ext.observe.writers.time.monotonic", lambda: next(clock))
    output = io.StringIO()
    lines = ConsoleLines(Console(file=output, width=40, highlight=False), 2, 6)
    for step in range(1, 6):
        record = {"loss_text": 0.5, "loss_vision": 2.0, "grad_norm": 0.25, "learning_rate": 1.5e-3}
        lines.write({"step": step, "loss": 1.0, **record, "timing": {"tokens_per_second": 1000.0 * step}})
    lines.write({"step": 5, "valid_loss": 3.0})
    assert output.getvalue().splitlines() == [
        "step 2/6 | loss 1.0000 | text 0.5000 | vision 2.0000 | grad 0.2500 | lr 1.50e-03 | 1,500 tokens/s | ETA 8s",
        "step 4/6 | loss 1.0000 | text 0.5000 | vision 2.0000 | grad 0.2500 | lr 1.50e-03 | 3,500 tokens/s | ETA 4s",
        "step 5/6 | valid_loss 3.0000",
    ]


def test_what_nothing_was_counted_for_is_no_curve(tmp_path):
    """A step of texts has no loss of visual labels: null in metrics.jsonl, and no `nan` where people read."""
    parts = {"loss_text": 0.5, "loss_vision": torch.tensor(float("nan")), "loss_dataset/web": 0.5}
    texts = {"step": 1, "loss": torch.tensor(0.5), **parts}
    held_out = {"step": 1, "valid_loss": 0.5, "valid_loss_text": 0.5, "valid_loss_vision": float("nan")}
    diverged = {"step": 2, "loss": float("nan"), "loss_text": float("nan"), "loss_vision": float("nan")}
    output = io.StringIO()
    lines = ConsoleLines(Console(file=output, width=40, highlight=False), 1, 9)
    for record in (texts, held_out, diverged):
        lines.write(record)
    assert [line.partition(" | ETA")[0] for line in output.getvalue().splitlines()] == [
        "step 1/9 | loss 0.5000 | text 0.5000",
        "step 1/9 | valid_loss 0.5000 | valid_loss_text 0.5000",
        "step 2/9 | loss nan | text nan | vision nan",
    ]
    assert list(counted(texts)) == ["step", "loss", "loss_text", "loss_dataset/web"]


@pytest.mark.parametrize(("seconds", "text"), [(8.4, "8s"), (125, "2m05s"), (11220, "3h07m"), (352800, "4d02h")])
def test_duration(seconds, text):
    assert duration(seconds) == text

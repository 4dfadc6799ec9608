"""Weights & Biases, offline: what its own program would upload, read back from the files it leaves."""

import json
import struct
import sys
from pathlib import Path

import pytest

from megatron_ext.config import InputError
from megatron_ext.config.observe import ObserveConfig
from megatron_ext.observe import Run

CONFIG = "train:\n  train_steps: 4\n"
BLOCK, HEADER = 32_768, 7


def logged(path: Path) -> list:
    """The protocol-buffer records of a .wandb file, which is a LevelDB log (google/leveldb, doc/log_format.md)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts, records = path.read_bytes(), HEADER, b"", []
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def history(records: list) -> list[dict]:
    """Step and values of every line of history."""
    lines = []
    for record in records:
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            lines.append({name: value for name, value in items.items() if name[0] != "_"} | {"step": items["_step"]})
    return lines


def _end_service() -> None:
    """End wandb's own process, which writes behind; it also keeps the settings that the first run began with."""
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        wandb.teardown()


@pytest.fixture(autouse=True)
def fresh_service():
    yield
    _end_service()


def line(step: int, loss: float) -> dict:
    return {"step": step, "loss": loss, "grad_norm/head": 0.5, "timing": {"step_seconds": 1.0}}


@pytest.mark.slow
def test_one_run_over_all_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    observe = ObserveConfig(run_dir=str(tmp_path / "story"), tensorboard=False, wandb_project="emu3-test")
    with pytest.raises(RuntimeError), Run.open(observe, True, CONFIG) as run:
        run.truncate_after(0)
        for step in (1, 2, 3):
            run.log_metrics(line(step, 4.0 - step))
        run.forget_after(2)
        run.log_metrics(line(2, 9.0))  # after a rewind: the first value stays there
        run.log_metrics({"step": 3, "valid_loss": 2.5})
        raise RuntimeError("killed")
    with Run.open(observe, True, CONFIG) as run:
        run.truncate_after(3)
        run.log_metrics(line(4, 0.5))
    _end_service()
    folders = sorted((tmp_path / "story" / "wandb").glob("offline-run-*"))
    first, second = (logged(next(folder.glob("*.wandb"))) for folder in folders)
    begun = [next(record.run for record in records if record.HasField("run")) for records in (first, second)]
    run_id = (tmp_path / "story" / "wandb_run_id").read_text().strip()
    assert [(run.run_id, run.project, run.display_name) for run in begun] == [(run_id, "emu3-test", "story")] * 2
    assert any(update.key == "train" for update in begun[0].config.update)
    steps = {entry["step"]: entry for entry in history(first)}
    assert [steps[step]["loss"] for step in (1, 2, 3)] == [3.0, 2.0, 1.0]
    assert steps[3]["valid_loss"] == 2.5 and steps[1]["grad_norm/head"] == 0.5
    assert steps[1]["timing/step_seconds"] == 1.0
    assert [(entry["step"], entry["loss"]) for entry in history(second)] == [(4, 0.5)]
    codes = [next(r.exit.exit_code for r in records if r.HasField("exit")) for records in (first, second)]
    assert codes == [1, 0]


def test_absence_matters_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Run.open(ObserveConfig(run_dir=str(tmp_path / "plain"), tensorboard=False), True, CONFIG) as run:
        run.log_metrics(line(1, 1.0))
    asked = ObserveConfig(run_dir=str(tmp_path / "asked"), tensorboard=False, wandb_project="emu3-test")
    with pytest.raises(InputError, match="observe.wandb_project is 'emu3-test' and wandb does not import"):
        Run.open(asked, True, CONFIG).__enter__()
    Run.open(asked, False, CONFIG).__enter__()  # only the rank that writes needs it


def test_no_login_is_told_in_a_line(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    observe = ObserveConfig(run_dir=str(tmp_path / "run"), tensorboard=False, wandb_project="emu3-test")
    with pytest.raises(InputError, match="WANDB_MODE=offline") as raised:
        Run.open(observe, True, CONFIG).__enter__()
    assert "\n" not in str(raised.value)

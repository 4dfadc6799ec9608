"""compare_runs.py on run folders that Run itself wrote."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_ext.config import InputError
from megatron_ext.config.observe import ObserveConfig
from megatron_ext.observe import Run
from tools import compare_runs

STEPS = 5


def run(folder: Path, *, lr: float = 0.1, data: str = "abc", skip: tuple[int, ...] = (), **changed: dict) -> str:
    """A run of five steps; `changed` maps a field to {step: value}, None to leave the field out."""
    config = {"optim": {"lr": lr}, "data": {"train": [{"prefix": "x"}]}, "observe": {"run_dir": str(folder)}}
    with Run.open(ObserveConfig(run_dir=str(folder), tensorboard=False), True, yaml.safe_dump(config)) as opened:
        opened.console.quiet = True
        opened.add_provenance(identities={"data": data, "vision_tokenizer": None})
        opened.truncate_after(0)
        for step in (step for step in range(1, STEPS + 1) if step not in skip):
            line = {"loss": 2.0 / step, "grad_norm": 0.5, "consumed_samples": 4 * step, "learning_rate": 0.0}
            line |= {name: values[step] for name, values in changed.items() if step in values}
            line = {name: value for name, value in line.items() if value is not None}
            opened.log_metrics({"step": step, **line, "timing": {"tokens_per_second": 100.0 * lr + step}})
            if step == 4:
                opened.log_metrics({"step": step, "valid_loss": 3.0})
    return str(folder)


def compared(capsys, *arguments: str) -> tuple[int, str]:
    code = 0
    try:
        compare_runs.main(list(arguments))
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().out


def test_equal(tmp_path, capsys):
    a, b = run(tmp_path / "a"), run(tmp_path / "b")
    code, printed = compared(capsys, a, b, "--tolerance", "0")
    assert code == 0 and printed.startswith("equal: steps 1 to 5, every field outside timing\n")
    assert "equal at every step: consumed_samples, grad_norm, learning_rate, loss, valid_loss" in printed
    assert "configuration: the same" in printed and "data: the same" in printed and "environment: the same" in printed
    assert "13 tokens/s" in printed  # the median of 11 to 15


def test_close(tmp_path, capsys):
    a = run(tmp_path / "a")
    b = run(tmp_path / "b", lr=0.2, loss={2: 1.00002, 4: 0.5 * (1 + 5e-5)}, data="def")
    code, printed = compared(capsys, a, b)
    assert code == 0 and printed.startswith("close: steps 1 to 5, every metric within 5.0e-05 (tolerance 1.0e-04)")
    row = next(line.split() for line in printed.splitlines() if line.startswith("  loss"))
    assert row == ["loss", "5.0e-05", "4", "0.5", "0.500025", "2"]
    assert "configuration: 1 different" in printed and ["optim.lr", "0.1", "0.2"] in map(
        str.split, printed.splitlines()
    )
    assert ["data", "abc", "def"] in map(str.split, printed.splitlines())


def test_parted(tmp_path, capsys):
    a, b = run(tmp_path / "a"), run(tmp_path / "b", loss={2: 1.00002, 4: 0.6, 5: 0.5}, grad_norm={5: 0.9})
    code, printed = compared(capsys, a, b)
    assert code == 1
    assert printed.startswith("parted at step 4: loss 0.5 and 0.6; equal before step 2 (tolerance 1.0e-04)")
    assert compared(capsys, a, b, "--tolerance", "0.3")[1].startswith("parted at step 5: grad_norm 0.5 and 0.9")
    code, printed = compared(capsys, a, b, "--json", "true")
    found = json.loads(printed)
    assert code == 1 and found["verdict"] == "parted" and found["parted_at"] == 4
    assert found["metrics"]["loss"] == {
        "largest": pytest.approx(0.2), "step": 5, "values": [0.4, 0.5],
        "first_difference": 2, "first_beyond": 4, "values_beyond": [0.5, 0.6],
    }  # fmt: skip


def test_no_tolerance_for_whole_numbers_and_nan(tmp_path, capsys):
    a = run(tmp_path / "a")
    b = run(tmp_path / "b", consumed_samples={3: 13})
    assert compared(capsys, a, b, "--tolerance", "9")[1].startswith("parted at step 3: consumed_samples 12 and 13")
    nan = run(tmp_path / "nan", loss={1: float("nan")})
    assert compared(capsys, a, nan, "--tolerance", "9")[1].startswith(
        "parted at step 1: loss 2 and -; they differ from the first step on"
    )
    assert compared(capsys, nan, nan)[1].startswith("equal")
    assert json.loads(compared(capsys, a, nan, "--json", "true")[1])["metrics"]["loss"]["largest"] is None


def test_missing_steps_and_fields(tmp_path, capsys):
    a = run(tmp_path / "a")
    shorter = run(tmp_path / "shorter", skip=(4, 5))
    assert compared(capsys, a, shorter)[1].startswith("close: steps 1 to 3"), "B never logged valid_loss"
    holed = run(tmp_path / "holed", skip=(3,))
    code, printed = compared(capsys, a, holed)
    assert code == 1 and printed.startswith("parted at step 3: B has no such step")
    assert "B lacks 1 steps, the first is 3" in printed
    bare = run(tmp_path / "bare", grad_norm=dict.fromkeys(range(1, 6)))
    code, printed = compared(capsys, a, bare)
    assert code == 0 and printed.startswith("close: ") and "only in A: grad_norm" in printed


def test_what_cannot_be_compared(tmp_path, capsys):
    a = run(tmp_path / "a")
    with pytest.raises(InputError, match="has no metrics.jsonl"):
        compare_runs.main([a, str(tmp_path / "none")])
    with pytest.raises(InputError, match="no step in common"):
        compare_runs.main([a, late(tmp_path / "late")])
    with pytest.raises(InputError, match="3 folders were given"):
        compare_runs.main([a, a, a])
    with pytest.raises(InputError, match="tolerance -1"):
        compare_runs.main([a, a, "--tolerance", "-1"])
    (tmp_path / "a" / "provenance.json").unlink()
    assert "data: unknown" in compared(capsys, a, a)[1]


def late(folder: Path) -> str:
    """A run whose only line is of step 9."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 9, "loss": 1.0}\n')
    return str(folder)

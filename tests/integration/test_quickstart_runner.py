"""The quickstart's runner, with programs of one line: reuse, what a change invalidates, interruption."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from megatron_ext.config import InputError
from tests.architecture.source import ROOT

_spec = importlib.util.spec_from_file_location("quickstart", ROOT / "examples" / "quickstart.py")
quickstart = importlib.util.module_from_spec(_spec)
sys.modules["quickstart"] = quickstart
_spec.loader.exec_module(quickstart)

APPEND = "import sys; from pathlib import Path; Path(sys.argv[2]).open('a').write(sys.argv[1])"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("x: 1\n")


def stage(name: str, *, config: str = "a.yaml", inputs: tuple[str, ...] = ()) -> quickstart.Stage:
    """Appends one letter to the file `name` and takes a configuration it does not read."""
    return quickstart.Stage(
        name=name,
        says=f"make {name}",
        command=(sys.executable, "-c", APPEND, name[0], name, config),
        inputs=inputs,
        outputs=(name,),
    )


def run(*stages: quickstart.Stage) -> None:
    quickstart.run_stages(stages, quickstart.Ledger(quickstart.Path("stages.json")))


def content(name: str) -> str:
    return quickstart.Path(name).read_text()


def test_finished_stages_are_reused(capfd):
    run(stage("first"), stage("second"))
    run(stage("first"), stage("second"))
    assert (content("first"), content("second")) == ("f", "s")
    output = capfd.readouterr().out
    assert "$ " + sys.executable in output and "[2/2] make second: reused" in output


def test_a_missing_output_is_made_again():
    run(stage("first"), stage("second"))
    quickstart.Path("second").unlink()
    run(stage("first"), stage("second"))
    assert (content("first"), content("second")) == ("f", "s")


@pytest.mark.parametrize("change", ["config", "input", "command"])
def test_a_change_runs_the_stage_and_all_after_it_from_scratch(change):
    quickstart.Path("media.txt").write_text("picture")
    run(stage("first"), stage("second", inputs=("*.txt",)), stage("third"))
    keys = {name: record["key"] for name, record in json.loads(content("stages.json")).items()}
    if change == "input":
        quickstart.Path("media.txt").write_text("another")
    quickstart.Path("b.yaml").write_text("x: 2\n")
    config = "b.yaml" if change == "config" else "a.yaml"
    name = "second" if change != "command" else "Second"
    run(stage("first"), stage(name, config=config, inputs=("*.txt",)), stage("third"))
    changed = json.loads(content("stages.json"))
    assert changed["first"]["key"] == keys["first"] and changed["third"]["key"] != keys["third"]
    # Outputs of another key are removed first: each file holds one letter, not two.
    assert (content("first"), content(name), content("third")) == ("f", name[0], "t")


def test_a_failed_stage_is_named_and_runs_again():
    failing = quickstart.Stage(name="bad", says="fail", command=(sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(InputError, match="stage bad ended with exit code 3"):
        run(stage("first"), failing)
    with pytest.raises(InputError, match="stage bad"):
        run(stage("first"), failing)
    assert content("first") == "f"


def test_a_stage_that_was_told_to_stop_is_not_finished():
    """A training that a signal or a stop file ends saves what it has, and ends without an error."""
    program = (
        "import json, sys; from pathlib import Path; run = Path('run'); run.mkdir(exist_ok=True);"
        "events = (run / 'events.jsonl').open('a+'); events.seek(0); done = len(events.readlines());"
        "print(json.dumps({'event': 'end', 'step': [6, 10][done]}), file=events)"
    )
    quickstart.Path("a.yaml").write_text("train: {train_steps: 10}\n")
    training = quickstart.Training(config="a.yaml", run="run")
    training = quickstart.Stage(
        name="training", says="train", command=(sys.executable, "-c", program), outputs=("run",), training=training
    )
    with pytest.raises(InputError, match="stage training was stopped before its end, run is at step 6 of 10"):
        run(training, stage("next"))
    assert not quickstart.Path("next").exists()
    run(training, stage("next"))
    assert content("next") == "n"


def test_a_stage_without_its_output_is_not_finished():
    idle = quickstart.Stage(name="idle", says="wait", command=(sys.executable, "-c", ""), outputs=("made",))
    with pytest.raises(InputError, match="stage idle was stopped before its end, made is not there"):
        run(idle, stage("next"))
    assert not quickstart.Path("next").exists()


def test_what_is_to_come_is_estimated_from_measured_steps(monkeypatch, capfd):
    quickstart.Path("a.yaml").write_text("train: {train_steps: 700}\n")
    half = quickstart.Training(config="a.yaml", run="run", until=300)
    rest = quickstart.Training(config="a.yaml", run="run", first=300)
    stages = [
        quickstart.Stage(name=str(part.first), says="train", command=(), training=part, starts=2.0)
        for part in (half, rest)
    ]
    assert quickstart.about(stages) == ""  # nothing is measured yet
    monkeypatch.setattr(quickstart, "PACE", quickstart.Path("pace.json"))
    quickstart.PACE.write_text(json.dumps({"start_s": 5.0, "step_s": {"a.yaml": 0.5}}))
    assert quickstart.about(stages) == " (about 6m10s)"  # 700 x 0.5 + 2 x 2 x 5
    assert quickstart.about(stages[1:], " to go") == " (about 3m30s to go)"
    run(stage("first"), stage("second"))
    assert "(about 5s to go)" in capfd.readouterr().out


def test_an_interrupted_stage_saves_and_goes_on(tmp_path):
    """Ctrl-C on the runner: the program gets SIGINT once, saves; the next run continues it with its outputs kept."""
    program = textwrap.dedent(
        """
        import signal, sys, time
        from pathlib import Path
        signals = []
        signal.signal(signal.SIGINT, lambda *_: signals.append(1))
        saved = Path("saved")
        if saved.exists():
            saved.write_text(saved.read_text() + "-resumed")
            sys.exit(0)
        Path("running").touch()
        while not signals:
            time.sleep(0.01)
        time.sleep(0.2)
        saved.write_text(f"interrupted {len(signals)} time")
        """
    )
    runner = textwrap.dedent(
        f"""
        import importlib.util, sys
        from pathlib import Path
        from megatron_ext.config import run_program
        spec = importlib.util.spec_from_file_location("quickstart", {str(ROOT / "examples" / "quickstart.py")!r})
        quickstart = importlib.util.module_from_spec(spec)
        sys.modules["quickstart"] = quickstart
        spec.loader.exec_module(quickstart)
        slow = quickstart.Stage(
            name="slow", says="wait", command=(sys.executable, "-c", {program!r}), outputs=("saved",)
        )
        run_program(lambda argv: quickstart.run_stages((slow,), quickstart.Ledger(Path("stages.json"))), [])
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", runner], env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path / "running").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert content("saved") == "interrupted 1 time"
    assert not json.loads(content("stages.json"))["slow"]["finished"]
    subprocess.run([sys.executable, "-c", runner], env=environment, check=True)
    assert content("saved") == "interrupted 1 time-resumed"
    assert json.loads(content("stages.json"))["slow"]["finished"]

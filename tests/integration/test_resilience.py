"""Bad steps, hangs, growing batches and notices, in real runs of pretrain_emu3.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

import pretrain_emu3
from megatron_ext.config import InputError, load
from megatron_ext.config.run import RunConfig
from megatron_ext.resilience.watchdog import EXIT_CODE
from megatron_ext.vocab import Text
from tests.support.small_run import write_small_run
from tests.unit.data.samples import make_vocabulary, write_dataset
from tools import run_report

STEPS = 24
ODD = "key/42"
"""The document that is like no other."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """config.yaml of a run on 60 documents that say the same, one a window, but for one that says nothing of the kind:
    once the others are learnt, its loss is a spike."""
    folder = tmp_path_factory.mktemp("resilience")
    config = write_small_run(folder)
    vocabulary = make_vocabulary((folder / "text.model").read_bytes())
    low, high = vocabulary.text_ranges[-1]
    same, odd = np.full(62, low + 5), np.random.default_rng(0).integers(low, high, 62)
    documents = [[Text(odd if f"key/{number}" == ODD else same)] for number in range(60)]
    write_dataset(folder / "spiky", vocabulary, documents, vision_tokenizer=None)
    config["data"]["train"] = [{"prefix": str(folder / "spiky")}]
    config["train"] |= {"train_steps": STEPS, "global_batch_size": 2}
    config["optim"] = {"lr": 1e-2, "lr_warmup_steps": 1, "lr_decay_style": "constant"}
    config["checkpoint"] = {"save_interval": 2, "async_save": False}
    config["resilience"] = {"spike_factor": 2.0, "spike_window": 4}
    config["runtime"] = {"device": "cpu"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def train(workplace: Path, run: str, *arguments: str) -> tuple[list[dict], list[dict]]:
    """Train in this process; the run's metrics without `timing`, and its events."""
    options = ["--config", str(workplace / "config.yaml"), "--observe.run_dir", str(workplace / run), *arguments]
    pretrain_emu3.train(load(RunConfig, options))
    return metrics(workplace / run), events(workplace / run)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(run: Path) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "timing"} for line in lines(run / "metrics.jsonl")]


def events(run: Path) -> list[dict]:
    return lines(run / "events.jsonl")


def one(events: list[dict], kind: str) -> dict:
    (event,) = [event for event in events if event["event"] == kind]
    return event


def test_a_spike_is_skipped(workplace: Path) -> None:
    log, told = train(workplace, "skip", "--resilience.on_bad_step", "skip")
    bad = one(told, "bad_step")
    assert ODD in bad["documents"] and bad["action"] == "skip" and "times the median" in bad["fault"]
    skipped = [line["step"] for line in log if line.get("skipped")]
    assert skipped == [bad["step"]] and [line["step"] for line in log] == list(range(1, STEPS + 1))
    after = next(line for line in log if line["step"] == bad["step"] + 1)
    # Not skipped, the odd document's gradient throws the weights off (test_a_spike_stops sees its loss).
    assert after["loss"] < 2 * next(line for line in log if line["step"] == bad["step"] - 1)["loss"] + 0.1


def test_a_spike_is_rewound_and_passed_over(workplace: Path) -> None:
    log, told = train(workplace, "rewind", "--resilience.on_bad_step", "rewind")
    bad, rewind = one(told, "bad_step"), one(told, "rewind")
    assert rewind["passed_over"] == [bad["samples"]] and rewind["step"] < bad["step"]
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    assert not any(line.get("skipped") for line in log)
    # The batch is left out, the ones after it take its place: every step has moved on by two samples but one, by four.
    consumed = np.diff([0, *(line["consumed_samples"] for line in log)])
    assert sorted(consumed) == [2] * (STEPS - 1) + [4] and consumed[bad["step"] - 1] == 4
    # The same data from the start, the bad batch left out by hand, trains to the same bits.
    stopped, _ = train(workplace, "by_hand", "--train.exit_interval", str(rewind["step"]))
    state = workplace / "by_hand" / "checkpoints" / f"step_{rewind['step']:08d}"
    assert state.is_dir() and stopped == log[: rewind["step"]]


def test_a_rewound_run_resumes_to_the_same_bits(workplace: Path) -> None:
    whole = metrics(workplace / "rewind")
    for _ in range(3):
        log, _ = train(workplace, "pieces", "--resilience.on_bad_step", "rewind", "--train.exit_interval", "8")
    assert log == whole


def test_the_report_of_a_run_in_pieces(workplace: Path, capsys) -> None:
    run = workplace / "pieces"
    if not run.exists():
        pytest.fail("test_a_rewound_run_resumes_to_the_same_bits leaves the run that is reported here")
    run_report.main(["--run", str(run)])
    assert "goodput" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    # The table of starts, and of events.
    assert page.count("stopped: train.exit_interval 8") == 2 and page.count("<td>finished</td>") == 1
    assert all(f"<td>{steps}</td>" in page for steps in ("0 to 8", "8 to 16", "16 to 24")) and "bad_step" in page
    assert page.count("<svg") >= 3 and 'src="http' not in page and "<link" not in page


def test_a_spike_stops_and_is_named(workplace: Path) -> None:
    with pytest.raises(InputError, match="more than 2 times the median") as raised:
        train(workplace, "stop")
    assert "on_bad_step" in str(raised.value) and "\n" not in str(raised.value)
    assert ODD in one(events(workplace / "stop"), "bad_step")["documents"]


def test_too_many_bad_steps_stop(workplace: Path) -> None:
    with pytest.raises(InputError, match=r"max_bad_steps"):
        train(workplace, "many", "--resilience.on_bad_step", "skip", "--resilience.max_bad_steps", "0")


def test_batches_grow_and_resume(workplace: Path) -> None:
    ramp = ("--train.global_batch_size", "8", "--train.global_batch_size_ramp", "[2,2,24]", "--train.train_steps", "10",
            "--resilience.spike_factor", "null")  # fmt: skip
    log, _ = train(workplace, "ramp", *ramp)
    assert [line["global_batch_size"] for line in log] == [2, 2, 2, 2, 4, 4, 6, 6, 8, 8]
    assert [line["consumed_samples"] for line in log] == np.cumsum([2, 2, 2, 2, 4, 4, 6, 6, 8, 8]).tolist()
    for _ in range(2):
        pieces, _ = train(workplace, "ramp_pieces", *ramp, "--train.exit_interval", "5")
    assert pieces == log


def test_the_end_is_told(workplace: Path) -> None:
    told = workplace / "told.txt"
    command = f'echo "$EMU3_OUTCOME $EMU3_STEP $EMU3_MESSAGE" >> {told}'
    options = ("--resilience.notify", command, "--resilience.spike_factor", "null", "--train.train_steps", "4")
    train(workplace, "told", *options, "--train.exit_interval", "2")
    train(workplace, "told", *options)
    with pytest.raises(InputError):
        train(workplace, "told", *options, "--model.num_layers", "2", "--train.train_steps", "5")
    stopped, finished, failed = told.read_text().splitlines()
    assert stopped == "stopped 2 step 2" and finished == "finished 4 step 4"
    assert failed.startswith("failed 0 InputError: ")


def test_a_hung_rank_ends_the_run_with_stacks(workplace: Path) -> None:
    run = workplace / "hang"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["pretrain_emu3.py", "--config", str(workplace / "config.yaml"), "--observe.run_dir", str(run)]
    command += ["--train.train_steps", "100000", "--checkpoint.save_interval", "100000"]
    command += ["--resilience.spike_factor", "null", "--resilience.hang_timeout_s", "6"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or not metrics(run):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        zero, one_ = sorted(
            (child for child in psutil.Process(process.pid).children() if "RANK" in child.environ()),
            key=lambda child: child.environ()["RANK"],
        )
        os.kill(one_.pid, signal.SIGSTOP)
        zero.wait(90)
        os.kill(one_.pid, signal.SIGKILL)  # torchrun would wait half a minute for it
        output, _ = process.communicate(timeout=120)
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
            child.kill()
        process.kill()
    assert process.returncode != 0
    assert f"exit code {EXIT_CODE}" in output
    assert f"exitcode  : {EXIT_CODE}" in output  # torchrun's own report of the rank
    stacks = (run / "stacks" / "rank_00000.txt").read_text()
    assert "distributed_c10d.py" in stacks and "loop.py" in stacks
    assert "step" in one(events(run), "hang")["activity"]

"""pretrain_emu3.py as a user runs it: torchrun, a run folder, stopping, resuming on another layout."""

import contextlib
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_ext.optim.gradient_groups import GROUPS
from tests.support import programs
from tests.unit.data.samples import CODEBOOK_SIZE, make_vocabulary, random_dataset, train_text_tokenizer
from tools import compare_runs

STEPS = 8
TP2 = ("--parallel.tensor_model_parallel_size", "2", "--parallel.sequence_parallel", "true")
CP2 = ("--parallel.context_parallel_size", "2")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with data, a text tokenizer and config.yaml."""
    folder = tmp_path_factory.mktemp("pretrain")
    model = train_text_tokenizer()
    (folder / "text.model").write_bytes(model)
    for name, seed in (("train", 0), ("valid", 1)):
        random_dataset(folder / name, make_vocabulary(model), seed=seed)
    config = {
        "vocab": {"layout": "custom", "text_tokenizer": str(folder / "text.model"), "codebook_size": CODEBOOK_SIZE},
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
                  "num_query_groups": 2, "kv_channels": 8, "attention_dropout": 0.1, "hidden_dropout": 0.1},
        "optim": {"lr": 1e-3, "lr_warmup_steps": 2},
        "train": {"seq_length": 64, "micro_batch_size": 1, "global_batch_size": 4,
                  "train_steps": STEPS, "eval_interval": 4},
        "data": {"train": [{"prefix": str(folder / "train")}], "valid": [{"prefix": str(folder / "valid")}],
                 "document_alignment": 4},
        "checkpoint": {"save_interval": 100},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def command(workplace: Path, run: str, *arguments: str, ranks: int = 1) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    options = ["--config", str(workplace / "config.yaml"), "--observe.run_dir", str(workplace / run)]
    return [*torchrun, "pretrain_emu3.py", *options, *arguments]


def pretrain(workplace: Path, run: str, *arguments: str, ranks: int = 1) -> programs.Finished:
    return programs.run(*command(workplace, run, *arguments, ranks=ranks))


def compared(workplace: Path, a: str, b: str, *arguments: str) -> tuple[int | None, str]:
    """Exit code and output of compare_runs.py."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            compare_runs.main([str(workplace / a), str(workplace / b), *arguments])
        except SystemExit as end:
            return end.code, output.getvalue()
    return 0, output.getvalue()


def metrics(workplace: Path, run: str) -> list[dict]:
    lines = (workplace / run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "timing"} for line in lines]


@pytest.fixture(scope="module")
def straight(workplace) -> list[dict]:
    result = pretrain(workplace, "straight")
    assert result.returncode == 0, result.stderr
    return metrics(workplace, "straight")


def test_the_run_folder(workplace, straight):
    run = workplace / "straight"
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.yaml", "provenance.json", "metrics.jsonl", "events.jsonl", "tensorboard", "checkpoints",
    }  # fmt: skip
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{STEPS:08d}"
    training = [line for line in straight if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    assert set(training[-1]) == {
        "step", "loss", "loss_text", "loss_vision", "loss_dataset/train", "grad_norm", "learning_rate",
        "global_batch_size", "consumed_samples", "consumed_tokens", *(f"grad_norm/{group}" for group in GROUPS),
    }  # fmt: skip
    assert training[-1]["consumed_samples"] == 4 * STEPS and training[-1]["consumed_tokens"] == 4 * STEPS * 64
    assert training[-1]["loss"] < training[0]["loss"]
    valid = [line for line in straight if "valid_loss" in line]
    assert [line["step"] for line in valid] == [4, 8]
    (start,) = json.loads((run / "provenance.json").read_text())
    assert start["step"] == 0 and start["identities"].keys() == {"vocabulary", "model", "data", "vision_tokenizer"}
    assert set(start["manifests"]) == {str(workplace / "train"), str(workplace / "valid")}
    assert start["packages"]["megatron-core"] and start["config"]["train"]["train_steps"] == STEPS
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["timing"]["tokens_per_second"] > 0


def test_stop_and_resume_is_the_straight_run_bit_for_bit(workplace, straight):
    """With dropout: its seeds are a function of the step, nothing of the generators is saved."""
    assert pretrain(workplace, "resumed", "--train.exit_interval", "3").returncode == 0
    assert metrics(workplace, "resumed")[-1]["step"] == 3
    assert pretrain(workplace, "resumed").returncode == 0
    assert metrics(workplace, "resumed") == straight
    code, printed = compared(workplace, "straight", "resumed")
    assert code == 0 and printed.startswith("equal: steps 1 to 8")
    assert "configuration: the same" in printed and "data: the same" in printed and "2 starts" in printed
    again = pretrain(workplace, "resumed")
    assert again.returncode == 0 and "nothing to do" in again.stdout


def test_resume_on_other_layouts(workplace):
    no_dropout = ("--model.attention_dropout", "0", "--model.hidden_dropout", "0")
    assert pretrain(workplace, "one", *no_dropout).returncode == 0
    for arguments, ranks in (((*TP2, "--train.exit_interval", "3"), 2), (CP2, 2)):
        result = pretrain(workplace, "moved", *no_dropout, *arguments, ranks=ranks)
        assert result.returncode == 0, result.stderr
    for found, expected in zip(metrics(workplace, "moved"), metrics(workplace, "one"), strict=True):
        assert found == pytest.approx(expected, rel=5e-6)  # measured 3e-7
    code, printed = compared(workplace, "one", "moved", "--tolerance", "5e-6")
    assert code == 0 and printed.startswith("close: steps 1 to 8") and "data: the same" in printed
    assert re.search(r"parallel\.context_parallel_size +1 +2\n", printed)


def test_a_signal_saves_and_stops(workplace, straight):
    log = workplace / "signalled" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    with programs.Program(*command(workplace, "signalled", "--train.train_steps", "5000")) as program:
        while not (log.exists() and log.read_text().count("\n") >= 2):
            assert time.monotonic() < deadline and program.poll() is None, program.stderr
            time.sleep(0.05)
        program.send_signal(signal.SIGTERM)
        assert program.wait(60) == 0, program.stderr
    last = metrics(workplace, "signalled")[-1]["step"]
    assert (workplace / "signalled" / "checkpoints" / "latest").read_text().strip() == f"step_{last:08d}"
    events = [json.loads(line) for line in (workplace / "signalled" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "resume", "stop", "save", "end"]
    assert events[2]["reason"] == "SIGTERM"


def test_a_signal_before_training_is_obeyed_in_a_job(workplace):
    """There torchrun is started to ignore SIGTERM (slurm/job.sh), and the ranks inherit it. A cold interpreter: its
    imports, too, are before training."""
    arguments = [sys.executable, *command(workplace, "preempted_early", "--train.train_steps", "5000")]
    process = subprocess.Popen(["bash", "-c", 'trap "" TERM; exec "$@"', "job", *arguments], stdout=subprocess.DEVNULL)
    events = workplace / "preempted_early" / "events.jsonl"
    deadline = time.monotonic() + 120
    while not events.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    (stop,) = (event for event in map(json.loads, events.read_text().splitlines()) if event["event"] == "stop")
    assert stop["reason"] == "SIGTERM" and stop["step"] == metrics(workplace, "preempted_early")[-1]["step"]


def test_torchrun_told_to_stop_saves_the_last_step(workplace):
    """SIGTERM to the agent goes to every process of the ranks, helpers of earlier saves included."""
    arguments = ("--checkpoint.save_interval", "1", "--train.train_steps", "5000", "--train.eval_interval", "0")
    started = [sys.executable, *command(workplace, "preempted", *arguments, *CP2, ranks=2)]
    process = subprocess.Popen(started, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    latest = workplace / "preempted" / "checkpoints" / "latest"
    deadline = time.monotonic() + 150
    while not latest.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    last = metrics(workplace, "preempted")[-1]["step"]
    assert latest.read_text().strip() == f"step_{last:08d}"


def test_a_gradient_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(workplace):
    arguments = ("--optim.lr", "1e30", "--optim.lr_warmup_steps", "0", "--checkpoint.save_interval", "1")
    result = pretrain(workplace, "diverged", *arguments)
    assert result.returncode == 2, result.stderr
    assert " nan; " in result.stderr and "key/" in result.stderr
    saved = int((workplace / "diverged" / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))
    assert saved == metrics(workplace, "diverged")[-1]["step"]


def test_init_from_takes_weights_only(workplace, straight):
    source = workplace / "straight" / "checkpoints"
    assert (
        pretrain(workplace, "tuned", "--checkpoint.init_from", str(source), "--train.train_steps", "3").returncode == 0
    )
    line = metrics(workplace, "tuned")[0]
    assert line["step"] == 1 and line["learning_rate"] == pytest.approx(5e-4)  # the warm-up begins anew
    assert line["loss"] < straight[0]["loss"] - 0.02


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--train.seed", "7"), "train.seed is 7, the run began with"),
        (("--data.document_alignment", "8"), "train has other windows than it had"),
        (("--vocab.codebook_size", "51"), "vocabulary"),
        (("--model.hidden_size", "64"), "was trained with model num_layers 2, hidden_size 32"),
    ],
)
def test_a_run_is_resumed_only_as_what_it_was(workplace, straight, arguments, named):
    result = pretrain(workplace, "straight", *arguments, "--train.train_steps", str(STEPS + 1))
    assert result.returncode == 2, result.stderr
    assert named in result.stderr.splitlines()[-1]
    assert metrics(workplace, "straight") == straight


def test_documents_that_do_not_fit_are_named(workplace):
    arguments = ("--train.seq_length", "8", "--train.train_steps", "3", "--train.eval_interval", "0")
    result = pretrain(workplace, "small", *arguments, "--data.max_bad_fraction", "1")
    assert result.returncode == 0, result.stderr
    assert "documents skipped, a picture or frame exceeds a window: key/" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--optim.lrr", "1"), "did you mean 'optim.lr'"),
        (("--parallel.tensor_model_parallel_size", "2"), "tensor_model_parallel_size 2"),
        (("--data.train", '[{"prefix": "no/such"}]'), "no/such"),
        (("--checkpoint.init_from", "no/such"), "no/such"),
        (("--vocab.codebook_size", "51"), "vocabulary"),
    ],
)
def test_bad_input_is_one_line(workplace, arguments, named):
    result = pretrain(workplace, "bad", *arguments)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ") and result.stderr.count("error: ") == 1, result.stderr
    assert named in result.stderr

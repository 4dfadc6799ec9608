"""kill -9 at random moments of a real run that saves in the background: of one rank, of a writer, of everything."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.unit.data.samples import CODEBOOK_SIZE, make_vocabulary, random_dataset, train_text_tokenizer

STEPS = 40
SEED = random.randrange(1 << 32)
"""Of the moments; in the message of every failure."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Iterator[Path]:
    """A folder with data, a text tokenizer and config.yaml: a checkpoint every second step. No run outlives it."""
    folder = tmp_path_factory.mktemp("kill")
    model = train_text_tokenizer()
    (folder / "text.model").write_bytes(model)
    random_dataset(folder / "train", make_vocabulary(model), seed=0)
    config = {
        "vocab": {"layout": "custom", "text_tokenizer": str(folder / "text.model"), "codebook_size": CODEBOOK_SIZE},
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
                  "num_query_groups": 2, "kv_channels": 8, "attention_dropout": 0.0, "hidden_dropout": 0.0},
        "optim": {"lr": 1e-3, "lr_warmup_steps": 2},
        "train": {"seq_length": 64, "micro_batch_size": 1, "global_batch_size": 4, "train_steps": STEPS},
        "data": {"train": [{"prefix": str(folder / "train")}], "document_alignment": 4},
        "checkpoint": {"save_interval": 2},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    yield folder
    kill(processes_of(folder))


def start(workplace: Path, run: str, *arguments: str) -> subprocess.Popen:
    """Two ranks under torchrun, which starts them again when one dies."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", "--monitor-interval", "0.1", "pretrain_emu3.py"]
    command += ["--config", str(workplace / "config.yaml"), "--observe.run_dir", str(workplace / run), *arguments]
    log = (workplace / f"{run}.log").open("a")
    return subprocess.Popen(command, stdout=log, stderr=log)


def finish(process: subprocess.Popen, workplace: Path, run: str) -> None:
    assert process.wait(240) == 0, f"seed {SEED}\n" + (workplace / f"{run}.log").read_text()[-4000:]


def lines(path: Path) -> list[dict]:
    """The whole lines of a file that is being written."""
    return (
        [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []
    )


def metrics(workplace: Path, run: str) -> list[dict]:
    return [
        {key: value for key, value in line.items() if key != "timing"}
        for line in lines(workplace / run / "metrics.jsonl")
    ]


def events(workplace: Path, run: str, kind: str) -> list[dict]:
    return [event for event in lines(workplace / run / "events.jsonl") if event["event"] == kind]


def patiently(process: subprocess.Popen) -> Iterator[None]:
    """Yields every millisecond; fails when the run ends or two minutes have passed."""
    deadline = time.monotonic() + 120
    while True:
        yield
        assert process.poll() is None and time.monotonic() < deadline, f"seed {SEED}"
        time.sleep(0.001)


def wait_for_step(process: subprocess.Popen, path: Path, step: int) -> None:
    for _ in patiently(process):
        if path.exists() and path.read_bytes().count(b"\n") >= step:
            return


def ranks_of(process: subprocess.Popen) -> list[int]:
    return [child.pid for child in psutil.Process(process.pid).children() if "pretrain_emu3.py" in child.cmdline()]


def writers_of(ranks: list[int]) -> list[int]:
    """The processes that ranks have forked: they write checkpoints, and nothing else is forked."""
    found = []
    for rank in ranks:
        try:
            found += map(int, Path(f"/proc/{rank}/task/{rank}/children").read_text().split())
        except OSError:  # the rank has ended
            pass
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def kill_a_writer(process: subprocess.Popen, workplace: Path, run: str) -> None:
    """Kill what is writing until a save has failed of it: a writer may be done before the signal comes."""
    for _ in patiently(process):
        kill(writers_of(ranks_of(process)))
        if events(workplace, run, "save_failed"):
            return


def processes_of(folder: Path) -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if str(folder) in " ".join(process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


@pytest.fixture(scope="module")
def undisturbed(workplace) -> list[dict]:
    finish(start(workplace, "undisturbed"), workplace, "undisturbed")
    return metrics(workplace, "undisturbed")


@pytest.fixture(scope="module")
def disturbed(workplace, undisturbed) -> str:
    """A run that lost one rank, then a writer, then everything; as it was left in the folder `copy`, and finished."""
    moments = random.Random(SEED)
    process = start(workplace, "disturbed")
    log = workplace / "disturbed" / "metrics.jsonl"
    wait_for_step(process, log, moments.randrange(3, 12))
    time.sleep(moments.uniform(0, 0.1))
    kill([moments.choice(ranks_of(process))])
    for _ in patiently(process):
        if len(events(workplace, "disturbed", "resume")) == 2:
            break
    kill_a_writer(process, workplace, "disturbed")
    failed = events(workplace, "disturbed", "save_failed")[0]["step"]
    for _ in patiently(process):
        if any(event["step"] > failed for event in events(workplace, "disturbed", "save")):
            break
    time.sleep(moments.uniform(0, 0.1))
    kill([process.pid, *ranks_of(process)])
    process.wait(10)
    deadline = time.monotonic() + 2  # writers see their parents die
    while processes_of(workplace / "disturbed"):
        assert time.monotonic() < deadline, f"seed {SEED}"
    shutil.copytree(workplace / "disturbed", workplace / "copy")
    finish(start(workplace, "disturbed"), workplace, "disturbed")
    return "disturbed"


def test_a_run_that_was_killed_three_times_is_the_undisturbed_one_bit_for_bit(workplace, undisturbed, disturbed):
    assert metrics(workplace, disturbed) == undisturbed, f"seed {SEED}"
    assert [line["step"] for line in undisturbed] == list(range(1, STEPS + 1))
    # What megatron-core says of every save when ranks hand it unlike dictionaries.
    assert "common state dict differs" not in (workplace / "undisturbed.log").read_text()
    resumed = [event["step"] for event in events(workplace, disturbed, "resume")]
    assert resumed[0] == 0 and len(resumed) == 3 and resumed[2] >= 2, f"seed {SEED}: {resumed}"
    last = workplace / disturbed / "checkpoints"
    assert (last / "latest").read_text() == f"step_{STEPS:08d}\n"
    assert len(list(last.iterdir())) == 3, "two checkpoints and `latest`: nothing of the killed attempts is left"


def test_the_killed_writer_is_reported_and_a_later_save_succeeds(workplace, disturbed):
    failed = events(workplace, disturbed, "save_failed")
    assert failed and all("the writer process ended with SIGKILL" in event["reason"] for event in failed)
    assert any(event["step"] > failed[0]["step"] for event in events(workplace, disturbed, "save"))


def test_every_start_records_what_its_bits_depend_on(workplace, disturbed):
    found = [event["environment"] for event in events(workplace, disturbed, "start")]
    assert len(found) == 3 and found[0] == found[1] == found[2]
    assert found[0].keys() == {"torch", "megatron_core", "device", "threads", "world_size", "layout"}
    assert found[0]["world_size"] == 2 and found[0]["layout"]["data_parallel_size"] == 2
    assert found[0]["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)


def test_killed_on_one_layout_and_finished_on_another(workplace, undisturbed, disturbed):
    arguments = ("--parallel.tensor_model_parallel_size", "2", "--parallel.sequence_parallel", "true")
    finish(start(workplace, "copy", *arguments), workplace, "copy")
    found = metrics(workplace, "copy")
    assert len(found) == len(undisturbed)
    for ours, theirs in zip(found, undisturbed, strict=True):
        # A window out of order would change a loss by some 1e-2.
        assert ours == pytest.approx(theirs, rel=1e-5), f"seed {SEED}"  # measured 2e-7

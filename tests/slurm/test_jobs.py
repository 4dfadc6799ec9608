"""The shipped scripts under a real Slurm: what a job meets in its life, and that the run comes to the same end."""

import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from megatron_ext.job.preflight import code_digest
from tests.slurm.cluster import kill_all, wait_until
from tests.slurm.runs import ROOT, STEPS, Runs

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def runs(cluster, tmp_path_factory) -> Runs:
    return Runs(cluster, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def undisturbed(runs) -> list[dict]:
    runs.finish("undisturbed", runs.submit("undisturbed"))
    found = runs.metrics("undisturbed")
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    return found


def starts(runs: Runs, name: str) -> list[tuple[int, int]]:
    """(restart, step) of the job's starts."""
    return [(event["restart"], event["step"]) for event in runs.events(name, "job_start")]


def ends(runs: Runs, name: str) -> list[tuple[str, str]]:
    return [(event["cause"], event["outcome"]) for event in runs.events(name, "job_end")]


def test_one_rank_for_each_gpu_of_each_node(runs, undisturbed):
    [start] = runs.events("undisturbed", "start")
    assert start["environment"]["world_size"] == 4
    assert starts(runs, "undisturbed") == [(0, 0)] and ends(runs, "undisturbed") == [("finished", "over")]


def where_it_stopped(runs: Runs, name: str) -> tuple[int, int]:
    """The step that a run which was told to stop has saved: the next start goes on from there, no other."""
    step = runs.events(name, "stop")[-1]["step"]
    return step, step


def a_rank_dies(runs: Runs, name: str, job: str) -> tuple[int, int]:
    """torchrun begins again, on the same nodes, in the same job."""
    bounds = runs.hold(name)
    kill_all(runs.ranks(name)[-1:])
    runs.go_on(name)
    wait_until(lambda: len(runs.resumed(name)) == 2, "torchrun does not begin again", 120)
    return bounds


def its_time_is_over(runs: Runs, name: str, job: str) -> tuple[int, int]:
    """The job is told, saves, and asks to be started again."""
    runs.hold(name)
    hours, minutes, _ = runs.cluster.job(job)["RunTime"].split(":")
    runs.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * int(hours) + int(minutes) + 1}")
    wait_until((runs.folder / name / "stop").exists, "Slurm does not tell of the time limit", 120)
    runs.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # the next start may take its time
    runs.go_on(name)
    wait_until(lambda: ends(runs, name)[-1:] == [("time limit", "again")], "the run does not stop")
    return where_it_stopped(runs, name)


def it_is_preempted(runs: Runs, name: str, job: str) -> tuple[int, int]:
    """Slurm wakes and ends the steps, and gives them a minute; the run saves and makes room within it."""
    runs.hold(name)
    urgent = runs.cluster.run(
        "sbatch", "--parsable", "-N2", "--exclusive", "--partition=urgent", "--output=/dev/null", "--wrap", "sleep 1"
    )
    runs.cluster.wait_for(urgent, "COMPLETED")
    assert ends(runs, name)[-1] == ("preemption", "again")
    assert runs.events(name, "stop")[-1]["reason"] == "SIGTERM"
    return where_it_stopped(runs, name)


def it_loses_a_node(node: str, runs: Runs, name: str, job: str) -> tuple[int, int]:
    """n1 takes the script and the rendezvous with it; without n2 torchrun waits for it. Slurm requeues the job."""
    bounds = runs.hold(name)
    runs.cluster.kill_node(node)
    wait_until(lambda: runs.cluster.job(job)["JobState"] != "RUNNING", "Slurm does not notice", 120)
    runs.cluster.start_node(node)
    return bounds


def a_user_cancels_it(runs: Runs, name: str, job: str) -> tuple[int, int]:
    """The run saves, and stays where it is until somebody submits it again."""
    runs.hold(name)
    runs.cluster.run("scancel", job)
    runs.cluster.wait_for(job, "CANCELLED")
    assert ends(runs, name)[-1] == ("ended by Slurm", "over")
    time.sleep(10)  # as long as a requeued job needs to come back
    assert runs.cluster.job(job)["JobState"] == "CANCELLED"
    return where_it_stopped(runs, name)


LIVES = {
    "queue": ((a_rank_dies, its_time_is_over, it_is_preempted), [0, 1, 2]),
    "machines": ((partial(it_loses_a_node, "n2"), partial(it_loses_a_node, "n1"), a_user_cancels_it), [0, 1, 2, 0]),
}
"""Name -> what happens to a run, and the restarts of its job: a submission begins at 0."""


# A group each: they wait for Slurm more than they compute, so workers with a cluster each lead them beside each other.
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in LIVES])
def test_a_run_comes_to_its_end(runs, undisturbed, name):
    """Each time it goes on from the step that it saved last, and it ends as the undisturbed run does."""
    disturbances, restarts = LIVES[name]
    job = runs.submit(name, MAX_RESTARTS="1")
    bounds = [(0, 0), *(disturb(runs, name, job) for disturb in disturbances)]
    if runs.cluster.job(job)["JobState"] == "CANCELLED":
        job = runs.submit(name, "--ntasks-per-node", "2", SBATCH_GPUS_PER_NODE="")
    runs.finish(name, job)
    resumed = runs.resumed(name)
    assert all(low <= step <= high for step, (low, high) in zip(resumed, bounds, strict=True)), (resumed, bounds)
    assert [restart for restart, _ in starts(runs, name)] == restarts
    assert {step for _, step in starts(runs, name)} <= set(resumed)
    assert runs.log(name).count("tokens/s") >= len(bounds), "logs append"
    assert runs.metrics(name) == undisturbed


def test_a_node_with_other_code_is_named_twice_and_then_the_job_stops(runs):
    """The preflight finds it; the second failure at the same step is the last, and says why."""
    copy = runs.folder / "old"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "tests", "docs", ".venv"))
    with (copy / "megatron_ext" / "__init__.py").open("a") as file:
        file.write("# an older state\n")
    python = runs.folder / "python"
    python.write_text(
        f'#!/bin/bash\nif [ "$SLURMD_NODENAME" = n2 ]; then export PYTHONPATH={copy}; fi\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    job = runs.submit("unlike", PYTHON=str(python), PREFLIGHT="yes")
    state = runs.cluster.wait_for(job, "FAILED", "COMPLETED", "CANCELLED")
    assert state["JobState"] == "FAILED" and state["ExitCode"] == "2:0"
    assert ends(runs, "unlike") == [("failed", "again"), ("failed", "given up")]
    log = runs.log("unlike")
    assert log.count("preflight: 4 ranks on 2 nodes") == 2, "logs append"
    *_, last = [line for line in log.splitlines() if line.startswith("error: ")]
    assert f"step 0 of {STEPS}, where it ended before: not started again" in last
    # One of two nodes is unlike the other: which, is a matter of their order.
    host, its, others = re.search(r"(n[12]) \(ranks 2, 3\): code is (\w+), elsewhere (\w+)", last).groups()
    assert its != others and {"n1": its, "n2": others}[host] == code_digest()
    assert not runs.metrics("unlike")


def test_bad_input_gets_one_line_before_the_queue(runs):
    missing = str(runs.folder / "none")
    cases = [
        ({"EMU3_SITE": missing}, (), "", f"site file {missing} is missing"),
        ({"PYTHON": missing}, (), "", f"{missing} is not there: run make build"),
        ({"PYTHON": "/usr/bin/python3"}, (), "", "has no torch, and so no torchrun"),
        ({}, ("--ntasks-per-node", "3"), "--runtime.device auto", "--ntasks-per-node 3 is more than --gpus-per-node 2"),
        ({}, ("-N", "3"), "", "train.global_batch_size 4 is not a multiple of"),
        ({}, (), "--optim.lrr 1", "did you mean 'optim.lr'?"),
        ({}, (), "--data.train []", "data.train is empty"),
        ({}, (), f"--observe.run_dir {runs.folder}/text.model/x", "observe.run_dir: cannot write"),
    ]
    for environment, queue, program, line in cases:
        result = runs.pretrain("refused", *queue, program=program, **environment)
        told = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
        assert result.returncode == 2 and len(told) == 1 and line in told[0], (line, result.stdout, result.stderr)
    assert runs.cluster.run("squeue", "--noheader") == "" and not (runs.folder / "refused").exists()


def test_submitted_from_inside_an_allocation(runs):
    """A job of its own, wherever salloc was typed: the script does not take the allocation for its job."""
    script = ["bash", ROOT / "slurm/convert.sbatch", "--hold", "check", "--hf", "none"]
    result = subprocess.run(
        ["salloc", "--nodes=1", "--ntasks=1", *script],
        cwd=runs.folder, env=runs.environment, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    allocation = re.search(r"Granted job allocation (\d+)", result.stderr)[1]
    submitted = result.stdout.rsplit(maxsplit=1)[-1]
    assert submitted != allocation
    job = runs.cluster.job(submitted)
    assert (job["JobName"], job["JobState"], job["WorkDir"]) == ("emu3-convert", "PENDING", str(ROOT))
    runs.cluster.run("scancel", submitted)


def test_a_user_asks_the_run_to_stop(runs):
    """It is not started again; nor is what Slurm knows of it a failure."""
    job = runs.submit("asked", "-N", "1", program="--train.train_steps 2000")
    runs.hold("asked", ranks=2)
    (runs.folder / "asked" / "stop").touch()
    runs.go_on("asked")
    assert runs.cluster.wait_for(job, "COMPLETED", "FAILED", "PENDING")["JobState"] == "COMPLETED"
    assert ends(runs, "asked") == [("stopped", "over")] and "not started again" in runs.log("asked")


def test_the_other_scripts(runs):
    """A vision tokenizer, a text tokenizer, a conversion, a shell."""
    write_media(runs.folder / "media")
    options = ("--output", str(runs.folder / "vision.log"), "--gpus-per-node", "0")
    vision = runs.script(
        "tokenizer.sbatch", *options, "vision", "--media.inputs", f"[{runs.folder}/media]", "--media.size", "8",
        "--media.batch_size", "2", "--train.train_steps", "2", "--model.ch", "32", "--model.ch_mult", "[1,1,1]",
        "--model.attn_resolutions", "[]", "--model.num_res_blocks", "1", "--codebook.kmeans_batches", "1",
        "--observe.run_dir", str(runs.folder / "vision"),
    )  # fmt: skip
    text = runs.script(
        "tokenizer.sbatch", "--output", str(runs.folder / "text.log"), "text", "--input", "[README.md]", "--output",
        str(runs.folder / "new.model"), "--vocab_size", "400",
    )  # fmt: skip
    convert = runs.script(
        "convert.sbatch", "--output", str(runs.folder / "convert.log"), "check", "--hf", str(runs.folder / "none")
    )
    for name, submitted, state in (
        ("vision", vision, "COMPLETED"), ("text", text, "COMPLETED"), ("convert", convert, "FAILED")
    ):  # fmt: skip
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        job = submitted.stdout.rsplit(maxsplit=1)[-1]
        found = runs.cluster.wait_for(job, "COMPLETED", "FAILED")["JobState"]
        assert found == state, runs.log(name)
    assert ends(runs, "vision") == [("finished", "over")] and (runs.folder / "vision" / "tokenizer").is_dir()
    assert (runs.folder / "new.model").is_file() and f"error: {runs.folder}/none" in runs.log("convert")
    shell = runs.script("interactive.sh", "-N", "2", typed="echo nodes=$SLURM_JOB_NUM_NODES python=$PYTHON\n")
    assert f"nodes=2 python={sys.executable}" in shell.stdout, shell.stdout + shell.stderr


def write_media(folder: Path) -> None:
    folder.mkdir()
    for number in range(4):
        Image.effect_noise((16, 16), 20 + number).convert("RGB").save(folder / f"{number}.png")

"""Tiny runs of the shipped scripts on a `Cluster`: submitted, held at a step, looked at."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import yaml

from megatron_ext.job.history import saved_step
from tests.slurm.cluster import Cluster, environment_of, wait_until
from tests.support.small_run import write_small_run

ROOT = Path(__file__).parents[2]
STEPS = 48
SAVE_INTERVAL = 6


class Runs:
    """Runs in one folder on one cluster: 2 nodes, 2 ranks each."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        """Write what they train on."""
        self.cluster = cluster
        self.folder = folder
        self._held: dict[str, int] = {}
        config = write_small_run(folder)
        config["train"] |= {"train_steps": STEPS}
        config["checkpoint"] = {"save_interval": SAVE_INTERVAL}
        config["runtime"] = {"device": "cpu", "num_threads": 1}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        self.environment = cluster.environment | {
            "PYTHON": sys.executable,
            "SBATCH_GPUS_PER_NODE": "2",
            "PREFLIGHT": "no",
            "MAX_RESTARTS": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }

    def submit(self, name: str, *queue: str, program: str = "", **environment: str) -> str:
        """Start run `name` as a user does, through the script itself; returns the job's number."""
        result = self.pretrain(name, *queue, program=program, **environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout.rsplit(maxsplit=1)[-1]

    def pretrain(self, name: str, *queue: str, program: str = "", **environment: str) -> subprocess.CompletedProcess:
        """`bash slurm/pretrain.sbatch` with options for sbatch and the program."""
        options = ["-N", "2", "--output", str(self.folder / f"{name}.log"), *queue]
        options += ["--config", str(self.folder / "config.yaml"), "--observe.run_dir", str(self.folder / name)]
        return self.script("pretrain.sbatch", *options, *program.split(), **environment)

    def script(self, script: str, *arguments: str, typed: str = "", **environment: str) -> subprocess.CompletedProcess:
        """`bash slurm/SCRIPT ARGUMENTS`; `typed` is its standard input."""
        return subprocess.run(
            ["bash", f"slurm/{script}", *arguments],
            cwd=ROOT, env=self.environment | environment, input=typed, capture_output=True, text=True, timeout=90,
        )  # fmt: skip

    def hold(self, name: str, *, ranks: int = 4) -> tuple[int, int]:
        """Let the ranks of a run stand still after one more checkpoint was begun, and a step; returns (the last step
        saved, the last step done).

        Slurm's signals then meet the run in the middle of its work, however fast the machine is.
        """
        after = self._held.get(name, 0) + SAVE_INTERVAL + 1
        wait_until(lambda: len(self.metrics(name)) >= after, f"{name} does not come to step {after}", 240)
        processes = self.ranks(name)
        assert len(processes) == ranks, processes
        send(signal.SIGSTOP, processes)
        self._held[name] = len(self.metrics(name))
        return saved_step(self.folder / name), self._held[name]

    def go_on(self, name: str) -> None:
        """End `hold`."""
        send(signal.SIGCONT, self.ranks(name))

    def ranks(self, name: str) -> list[psutil.Process]:
        """The processes that train."""
        found = {}
        for process in psutil.process_iter(["cmdline", "ppid", "status"]):
            command = process.info["cmdline"] or []
            if "pretrain_emu3.py" in command and str(self.folder / name) in command:
                if "RANK" in environment_of(process) and process.info["status"] != psutil.STATUS_ZOMBIE:
                    found[process.pid] = process
        # A rank that saves has forked a writer: alike in all that is looked at, but for its parent.
        return [process for process in found.values() if process.info["ppid"] not in found]

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl without `timing`."""
        lines = self._lines(name, "metrics.jsonl")
        return [{key: value for key, value in line.items() if key != "timing"} for line in lines]

    def events(self, name: str, *kinds: str) -> list[dict[str, Any]]:
        """Lines of events.jsonl of these kinds."""
        return [event for event in self._lines(name, "events.jsonl") if event["event"] in kinds]

    def resumed(self, name: str) -> list[int]:
        """The steps after which the starts of a run began, in-job ones too."""
        return [event["step"] for event in self.events(name, "resume")]

    def log(self, name: str) -> str:
        """What the job has printed."""
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def finish(self, name: str, job: str) -> None:
        """Wait for the end of a job that is to reach its last step."""
        state = self.cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")["JobState"]
        assert state == "COMPLETED", f"{state}\n{self.log(name)[-6000:]}"
        assert self.events(name, "job_end")[-1]["cause"] == "finished", self.log(name)[-6000:]

    def _lines(self, name: str, file: str) -> list[dict[str, Any]]:
        path = self.folder / name / file
        content = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in content.splitlines(True) if line.endswith("\n")]


def send(number: signal.Signals, processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            pass

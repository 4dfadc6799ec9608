"""One start of the run under torchrun, and its processes: found by what they are, killed by their numbers."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.processes import is_running

ROOT = Path(__file__).parents[2]
RANKS = 2
RESTARTS = 3
"""By torchrun within a job; then the job ends, and is started again."""


@dataclass(frozen=True)
class Job:
    """A torchrun and what it has started."""

    run: Path
    torchrun: subprocess.Popen

    @classmethod
    def start(cls, run: Path, *arguments: str) -> "Job":
        """Start the run in folder `run`, whose configuration is config.yaml beside it; output goes to RUN.log."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        command += ["--max-restarts", str(RESTARTS), "--monitor-interval", "0.1", "pretrain_emu3.py"]
        command += ["--config", str(run.parent / "config.yaml"), "--observe.run_dir", str(run), *arguments]
        with run.with_suffix(".log").open("a") as log:
            # A session of its own: Ctrl-C is the soak's.
            return cls(run, subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True))

    @property
    def is_alive(self) -> bool:
        return self.torchrun.poll() is None

    def ranks(self) -> list[int]:
        """Process numbers of the ranks that torchrun has started and not lost, rank 0 first."""
        found = {}
        for child in children_of(self.torchrun.pid):
            try:
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            number = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
            if number:
                found[number[0]] = child
        return [found[number] for number in sorted(found)]

    def tail(self) -> str:
        """The last words of the log."""
        log = self.run.with_suffix(".log")
        return log.read_text(errors="replace")[-3000:] if log.exists() else ""


def children_of(pid: int) -> list[int]:
    """The running ones of its main thread: quickly, in the middle of a save."""
    try:
        children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    except OSError:  # it has ended
        return []
    return [child for child in children if is_running(child)]  # a signal reaches a zombie, and does nothing


def writers_of(ranks: Iterable[int]) -> list[int]:
    """The processes that ranks have forked: they write checkpoints, and nothing else is forked."""
    return [child for rank in ranks for child in children_of(rank)]


def processes_of(run: Path) -> list[int]:
    """Every living process that has the run folder among its arguments: torchrun, ranks, writers, of any start."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if str(run) in (process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def send(number: signal.Signals, pids: Iterable[int]) -> int:
    """How many of them were still there."""
    reached = 0
    for pid in pids:
        try:
            os.kill(pid, number)
            reached += 1
        except ProcessLookupError:
            pass
    return reached


def forbid_files(pids: Iterable[int]) -> int:
    """Let no file of these processes grow: every write fails, as it does on a full disk. How many were reached."""
    reached = 0
    for pid in pids:
        try:
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
            reached += 1
        except ProcessLookupError:
            pass
    return reached


def wait_until_gone(run: Path, seconds: float) -> bool:
    """Whether all processes of the run ended in that time."""
    deadline = time.monotonic() + seconds
    while processes_of(run):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True

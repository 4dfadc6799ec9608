"""Carry out one kill of the plan, look at what it left, and see the run go on."""

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.soak import plan
from tests.soak.findings import examine
from tests.soak.job import Job, forbid_files, processes_of, send, wait_until_gone, writers_of
from tests.soak.plan import Kill
from tests.soak.watch import Event, Watch

PATIENCE_S = 300.0
"""For anything to come: a start on a busy machine takes 30 s."""

FULL = Path("/dev/full")
"""Every write to it fails as on a full disk: the kernel's own ENOSPC, for the file that is a link to it."""


class Broken(Exception):
    """The run did not do what it must: not come up, not go on, lose a checkpoint."""


class Events:
    """What the run has said in events.jsonl so far; every line is read once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._known: list[dict[str, Any]] = []

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        """Those of these kinds, in order."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._read += len(whole)
            self._known += map(json.loads, whole.splitlines())
        return [event for event in self._known if event["event"] in kinds]


@dataclass
class Striker:
    """Starts the run in `run`, kills it as it is told, and starts it again."""

    run: Path
    start_up_s: float
    """An undisturbed start on this machine."""
    _job: Job | None = None
    _job_began: float = 0.0
    _came_up: int = 0
    """Resumes that there were when the ranks were started."""
    _resumes: int = 0
    """Those that have been looked at."""
    _floor: int = 0
    """Step of the last checkpoint that was seen."""
    _left: set[str] = field(default_factory=set)
    """In the folder of checkpoints, after the last kill."""

    def __post_init__(self) -> None:
        self.watch = Watch(self.run)
        self.events = Events(self.run / "events.jsonl")
        self._resumes = len(self.events.of("resume"))
        self._floor = examine(self.run)["latest"] or 0

    def strike(self, kill: Kill) -> dict[str, Any]:
        """What was done and found.

        Raises:
            Broken: a checkpoint is unusable, or the run did not go on.
        """
        began = time.monotonic()
        job = self._started()
        reached, met = self._wait_for_moment(job, kill)
        others = processes_of(self.run)
        send(signal.SIGSTOP, others)  # nothing moves on while the folder is read
        try:
            found = examine(self.run, self._left)
        finally:
            send(signal.SIGCONT, others)
        found["resumed"] = self._check_resumes(found)
        found["after"] = self._aftermath(job, kill, found, met)
        root = self.run / "checkpoints"
        self._left = {path.name for path in root.iterdir()} - {"latest"} if root.is_dir() else set()
        return {"met": met, "reached": reached, **found, "seconds": round(time.monotonic() - began, 1)}

    def finish(self) -> None:
        """Let the run reach its last step."""
        job = self._started()
        try:
            code = job.torchrun.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            code = None
        if code != 0:
            raise Broken(f"the run does not reach its last step:\n{job.tail()}")
        self._check_resumes(examine(self.run))

    def stop(self) -> None:
        """Kill what runs."""
        send(signal.SIGKILL, processes_of(self.run))
        wait_until_gone(self.run, 10)
        self.watch.close()

    def _started(self) -> Job:
        if self._job is None or not self._job.is_alive:
            self._came_up = len(self.events.of("resume"))
            self._job = Job.start(self.run)
            self._job_began = time.monotonic()
        return self._job

    # the moment

    def _wait_for_moment(self, job: Job, kill: Kill) -> tuple[int, str]:
        """Kill at the moment; how many processes that reached, and what had been waited for."""
        if kill.moment == plan.START_UP:
            return self._in_start_up(job, kill)
        for _ in self._patiently(job, "the first step"):
            if len(self.events.of("resume")) > self._came_up:
                break
        self.watch.forget()
        self._until(job, f"step {kill.step}", lambda event: self._has_reached(kill.step, event))
        hit = self._aim(job, kill)
        if kill.moment == plan.ANY_TIME:
            time.sleep(kill.delay_s)
            return hit(), f"{kill.delay_s:g} s after step {kill.step}"
        if kill.target == plan.ONE_FILE_FULL:
            return self._fill_a_file(job, kill)
        what, path = plan.MOMENTS[kill.moment]
        reached = 0
        while not reached:  # a writer may be done before the signal comes: then the next one's
            event = self._until(job, kill.moment, _is(what, path))
            reached = hit()
        return reached, f"{event.what} {event.path}"

    def _in_start_up(self, job: Job, kill: Kill) -> tuple[int, str]:
        moment = self._job_began + kill.share * self.start_up_s
        while job.is_alive and time.monotonic() < moment and len(self.events.of("resume")) == self._came_up:
            time.sleep(0.02)
        if kill.target == plan.EVERYTHING:
            reached = send(signal.SIGKILL, processes_of(self.run))  # also what a killed torchrun has left
        else:
            for _ in self._patiently(job, "a rank"):
                if ranks := job.ranks():
                    break
            reached = send(signal.SIGKILL, [ranks[kill.rank % len(ranks)]])
        return reached, f"{time.monotonic() - self._job_began:.2f} s after the start"

    def _aim(self, job: Job, kill: Kill) -> Callable[[], int]:
        """What kills; it knows its targets already, but for processes that come and go with a save."""
        ranks = job.ranks()
        everything = [job.torchrun.pid, *ranks]
        one = ranks[kill.rank % len(ranks)] if ranks else 0
        targets: dict[str, Callable[[], list[int]]] = {
            plan.RANK: lambda: [one],
            plan.MAIN_RANK: lambda: ranks[:1],
            plan.ALL_RANKS: lambda: ranks,
            plan.WRITER: lambda: writers_of(ranks),
            plan.EVERYTHING: lambda: [*everything, *writers_of(ranks)],
            plan.TORCHRUN: lambda: [job.torchrun.pid],
        }
        if kill.target == plan.TERMINATE:
            return lambda: send(signal.SIGTERM, [*everything, *writers_of(ranks)])
        if kill.target == plan.ALL_FILES_FULL:
            return lambda: forbid_files([*ranks, *writers_of(ranks)])
        return lambda: send(signal.SIGKILL, targets[kill.target]())

    def _fill_a_file(self, job: Job, kill: Kill) -> tuple[int, str]:
        """Put a link to /dev/full where the next save will write: a file of weights, or the manifest."""
        is_manifest = kill.moment == "manifest written"
        folder = plan.PARTIAL if is_manifest else plan.PARTIAL + "/decoder"
        while True:
            event = self._until(job, "a save", _is("made", folder))
            path = self.run / event.path / ("manifest.json" if is_manifest else "__0_0.distcp")
            try:
                path.symlink_to(FULL)
                return 1, f"made {event.path}, where {path.name} is on a full disk"
            except OSError:  # too late for this one
                continue

    def _has_reached(self, step: int, event: Event) -> bool:
        return event.path == "metrics.jsonl" and last_step(self.run / "metrics.jsonl") >= step

    def _until(self, job: Job, what: str, matches: Callable[[Event], bool]) -> Event:
        """The first event that matches."""
        began = time.monotonic()
        while True:
            for event in self.watch.events(1.0):
                if matches(event):
                    return event
            self._still(job, began, what)

    def _still(self, job: Job, began: float, what: str) -> None:
        if not job.is_alive:
            raise Broken(f"the job ended with {job.torchrun.returncode} before {what}:\n{job.tail()}")
        if time.monotonic() - began > PATIENCE_S:
            raise Broken(f"{what} did not come within {PATIENCE_S:g} s:\n{job.tail()}")

    # what follows

    def _check_resumes(self, found: dict[str, Any]) -> list[int]:
        """The steps that starts since the last kill went on from; none may lie before the checkpoint found there."""
        if found["unusable"]:
            raise Broken("; ".join(found["unusable"]))
        resumed = [event["step"] for event in self.events.of("resume")[self._resumes :]]
        self._resumes += len(resumed)
        if resumed and min(resumed) < self._floor:
            raise Broken(f"went on from step {min(resumed)}, and checkpoint {self._floor} was there")
        self._floor = found["latest"] or self._floor
        return resumed

    def _aftermath(self, job: Job, kill: Kill, found: dict[str, Any], met: str) -> str:
        """Wait until the run has dealt with it; what it did."""
        if kill.target in (plan.WRITER, plan.ONE_FILE_FULL):
            return self._after_a_lost_save(job, int(re.search(r"partial-(\d+)", met)[1]))
        if kill.target == plan.EVERYTHING:
            job.torchrun.wait()
            if not wait_until_gone(self.run, 10):  # writers see their parents die
                raise Broken("a process outlived the kill of everything")
            return "started again"
        if kill.target == plan.TORCHRUN:
            job.torchrun.wait()
            return "started again at once"
        if kill.target == plan.TERMINATE:
            return self._after_terminate(job, found)
        return self._after_lost_ranks(job)

    def _after_a_lost_save(self, job: Job, step: int) -> str:
        """The save of `step` fails and is reported; one that was whole already is not lost."""
        for _ in self._patiently(job, f"the end of the save of step {step}"):
            last = self.events.of("resume", "save", "save_failed")[-1]
            if last["event"] != "resume" and last["step"] >= step:
                return f"save failed: {last['reason']}" if last["event"] == "save_failed" else "the save was whole"
        raise AssertionError("unreachable")

    def _after_terminate(self, job: Job, found: dict[str, Any]) -> str:
        if not wait_until_gone(self.run, 60):
            raise Broken(f"alive 60 s after SIGTERM:\n{job.tail()}")
        job.torchrun.wait()
        left = examine(self.run, self._left)
        if left["unusable"] or left["latest"] != left["last_step"]:
            raise Broken(f"SIGTERM at step {left['last_step']} left checkpoint {left['latest']}: {left['unusable']}")
        found["latest"] = self._floor = left["latest"]
        return f"saved step {left['latest']} and ended"

    def _after_lost_ranks(self, job: Job) -> str:
        """torchrun starts the ranks again, or ends when it has done so often enough."""
        self._came_up = len(self.events.of("resume"))
        began = self._job_began = time.monotonic()
        while job.is_alive:
            if len(self.events.of("resume")) > self._came_up:
                return "torchrun started the ranks again"
            if time.monotonic() - began > PATIENCE_S:
                raise Broken(f"torchrun neither starts the ranks again nor ends:\n{job.tail()}")
            time.sleep(0.05)
        if not wait_until_gone(self.run, 60):
            raise Broken("ranks outlived torchrun")
        return f"torchrun ended with {job.torchrun.returncode}"

    def _patiently(self, job: Job, what: str) -> Iterator[None]:
        began = time.monotonic()
        while True:
            yield
            self._still(job, began, what)
            time.sleep(0.02)


def last_step(path: Path) -> int:
    """Of the last whole line of a metrics.jsonl that is being written."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
    if not lines or not lines[-1].startswith(b'{"step": '):
        return 0
    return int(lines[-1][9:].split(b",", 1)[0])


def _is(what: str, path: str) -> Callable[[Event], bool]:
    pattern = re.compile(path)
    return lambda event: event.what == what and pattern.fullmatch(event.path) is not None

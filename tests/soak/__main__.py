"""Kill a small run at least a hundred times: no checkpoint may be lost, no bit of its metrics may change.

python -m tests.soak [--kills N] [--seed N] [--folder FOLDER] [--docs docs]

Two ranks on the CPU train under torchrun and save every second step. Killed are ranks, writers, torchrun, everything,
at any time and at every moment of a save; disks are full. Interrupted, it goes on where it was when started again.
Ends with 1 where a checkpoint was unusable, the run did not go on, or its metrics differ. FOLDER/log.jsonl tells all.
"""

import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_ext.config import InputError, load, run_program
from megatron_ext.observe.compare import History, compare
from tests.soak.job import RANKS, Job, processes_of, send, wait_until_gone
from tests.soak.plan import KINDS, Kill, Kind, plan, steps_of
from tests.soak.strike import Broken, Events, Striker
from tests.soak.summary import read_log, table, write_into
from tests.support.small_run import write_small_run


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    """Kill a small run again and again, and see that nothing is lost."""

    kills: int = 100
    """How often: four rounds of all kinds."""

    seed: int | None = None
    """Of targets and moments; null draws one. The log has it."""

    folder: str = "runs/soak"
    """Where all of it happens. What is there is gone on with; remove it to begin anew."""

    docs: str | None = None
    """Folder of the documentation, whose table and log are replaced when the soak has ended well."""


class Soak:
    """The kills of one folder."""

    def __init__(self, folder: Path, count: int, seed: int, kinds: tuple[Kind, ...] = KINDS) -> None:
        """Make the folder, or take up the soak that is there.

        Raises:
            InputError: the one that is there has another plan.
        """
        self.folder = folder.resolve()
        self.log = self.folder / "log.jsonl"
        self.undisturbed, self.run = self.folder / "undisturbed", self.folder / "run"
        self.plan = plan(seed, count, RANKS, kinds)
        self.steps = steps_of(count)
        head = {"soak": 1, "kills": count, "seed": seed, "ranks": RANKS, "steps": self.steps}
        records = read_log(self.log)
        if not records:
            self._prepare()
            self._write(head | {"torch": torch.__version__, "began": round(time.time())})
        elif {name: records[0].get(name) for name in head} != head:
            raise InputError(f"folder {str(folder)!r} holds a soak of other kills or another seed: remove it")
        else:
            self._write({"taken_up": round(time.time())})
        for run in (self.undisturbed, self.run):  # what a soak that was killed itself has left
            send(signal.SIGKILL, processes_of(run))
            wait_until_gone(run, 10)

    def next_kills(self) -> list[Kill]:
        """Those of the plan that are to come."""
        return self.plan[sum("kill" in record for record in read_log(self.log)) :]

    def run_undisturbed(self) -> float:
        """Train without a kill, unless that is done; seconds of its start."""
        events = Events(self.undisturbed / "events.jsonl")
        if not any(event["finished"] for event in events.of("end")):
            shutil.rmtree(self.undisturbed, ignore_errors=True)
            began = time.time()
            job = Job.start(self.undisturbed)
            if job.torchrun.wait() != 0:
                raise Broken(f"the run fails undisturbed:\n{job.tail()}")
            events = Events(self.undisturbed / "events.jsonl")
            self._write({"undisturbed": True, "start_up_s": round(events.of("resume")[0]["time"] - began, 2)})
        return next(record["start_up_s"] for record in read_log(self.log) if "undisturbed" in record)

    def strike(self, striker: Striker, kill: Kill) -> dict[str, Any]:
        """Carry out one kill and write it down."""
        record: dict[str, Any] = {"kill": kill.number, **{k: v for k, v in asdict(kill).items() if k != "number"}}
        record |= striker.strike(kill)
        self._write(record | {"time": round(time.time(), 1)})
        return record

    def verdict(self, striker: Striker) -> str:
        """Let the run reach its end; `equal` where its metrics are the undisturbed ones bit for bit."""
        striker.finish()
        found = compare(History.read(self.undisturbed), History.read(self.run), 0.0)
        steps = len(found.steps)
        verdict = found.verdict if steps == self.steps else f"{steps} steps instead of {self.steps}"
        records = read_log(self.log)
        counts = {kind: len(striker.events.of(kind)) for kind in ("start", "resume", "save", "save_failed")}
        minutes = round((time.time() - records[0]["began"]) / 60, 1)
        self._write({"end": {"verdict": verdict, "steps": steps, **counts, "minutes": minutes}})
        return verdict

    def write_down(self, what: str, text: str) -> None:
        """Add to the log that the soak was interrupted or `broken`, and by what."""
        self._write({what: text, "time": round(time.time(), 1)})

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        config = write_small_run(self.folder)
        config["model"] |= {"num_query_groups": 2, "attention_dropout": 0.0, "hidden_dropout": 0.0}
        config["train"] |= {"train_steps": self.steps, "micro_batch_size": 1}
        config |= {"checkpoint": {"save_interval": 2}, "runtime": {"device": "cpu", "num_threads": 1}}
        # Five gradient buckets, two of them padded, and perhaps the last.
        config["parallel"] = {"overlap_grad_reduce": True, "bucket_size": 300}
        config["optim"] = {"lr": 1e-3, "lr_warmup_steps": 2}
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config))

    def _write(self, record: dict[str, Any]) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def carry_out(soak: Soak, after: Callable[[int], object] = lambda number: None) -> str:
    """All kills that are left, and `after(number)` each; the verdict."""
    print("first without a kill", flush=True)
    striker = Striker(soak.run, soak.run_undisturbed())
    left, began = soak.next_kills(), time.monotonic()
    try:
        for done, kill in enumerate(left, start=1):
            record = soak.strike(striker, kill)
            after(kill.number)
            eta = (time.monotonic() - began) / done * (len(left) - done)
            print(
                f"{kill.number + 1:>3}/{len(soak.plan)}  {kill.target}, {kill.moment}: step {record['last_step']}, "
                f"{record['state']}; {record['after']}  ({record['seconds']:.0f} s, ETA {eta / 60:.1f} min)",
                flush=True,
            )
        return soak.verdict(striker)
    except (Broken, KeyboardInterrupt) as error:
        soak.write_down("broken" if isinstance(error, Broken) else "interrupted", str(error))
        raise
    finally:
        striker.stop()


def main(argv: list[str]) -> None:
    """Soak; exit with 1 where something is lost."""
    config = load(SoakConfig, argv, prog="soak")
    folder = Path(config.folder)
    records = read_log(folder / "log.jsonl")
    seed = config.seed
    if seed is None:
        seed = records[0]["seed"] if records else random.randrange(1 << 32)
    soak = Soak(folder, config.kills, seed)
    print(f"{config.kills} kills, seed {seed}; the log is {soak.log}", flush=True)
    try:
        verdict = "equal" if any("end" in record for record in records) else carry_out(soak)
    except Broken as error:
        print(f"BROKEN: {error}", file=sys.stderr)
        sys.exit(1)
    print(table(read_log(soak.log)))
    if verdict != "equal":
        print(f"the metrics are {verdict}: python tools/compare_runs.py {soak.undisturbed} {soak.run}", file=sys.stderr)
        sys.exit(1)
    if config.docs is not None:
        write_into(Path(config.docs), soak.log)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    run_program(main)

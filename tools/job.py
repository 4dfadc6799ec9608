"""A run as a job in a queue, for the scripts in slurm/: is it fit to wait, it starts, it has ended.

python tools/job.py check --queue "-N 16 --gpus-per-node 8" --config FILE [--section.field VALUE ...]
python pretrain_emu3.py --config FILE --print_config | python tools/job.py begin --job 12 --nodes NAMES
python pretrain_emu3.py --config FILE --print_config | python tools/job.py end --exit_code 1 ...

`begin` prints the run's folder. `end` ends with 0 where the job is over, with 75 where it goes back into the queue, and
with 2 where it has failed for good.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.config import InputError, load, run_program
from megatron_ext.config.run import RunConfig
from megatron_ext.config.section import Name, Number, Section
from megatron_ext.job import Request, begin, check_place, end
from megatron_ext.job.history import Outcome
from megatron_ext.plan import take_question

AGAIN = 75
"""EX_TEMPFAIL of sysexits.h."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig(RunConfig):
    """Check that a run could start as a job: its configuration, as pretrain_emu3.py takes it."""

    queue: str = ""
    """Options for sbatch; nodes, GPUs and ranks per node are read from them."""


@dataclass(frozen=True, kw_only=True)
class BeginConfig(Section):
    """Note the start of a job; the run's configuration is read from standard input."""

    job: Name
    """Number of the job."""

    restart: Number = 0
    """How often the queue has started it before."""

    nodes: Name
    """Names of its nodes."""


@dataclass(frozen=True, kw_only=True)
class EndConfig(Section):
    """Judge the end of a job; the run's configuration is read from standard input."""

    exit_code: int
    """Of the job's programs."""

    time_limit: bool = False
    """The job was told that its time is nearly over."""

    state: str = ""
    """What `scontrol show job` says of the job."""


def check(argv: list[str]) -> None:
    """Check, then print the plan."""
    config = load(CheckConfig, argv, prog="job.py check")
    request = Request.of(shlex.split(config.queue))
    check_place(config, request)
    from megatron_ext.plan.report import answer

    question, _ = take_question(["--dry_run", "--world_size", str(request.world_size)])
    answer(question, config)


def note_begin(argv: list[str]) -> None:
    """Note a start, and print the run's folder."""
    config = load(BeginConfig, argv, prog="job.py begin")
    run_folder, train_steps = _run()
    saved = begin(run_folder, config.job, config.restart, config.nodes)
    again = f", start {config.restart + 1}" if config.restart else ""
    print(
        f"job {config.job}{again} on {config.nodes}: after step {saved} of {train_steps}", file=sys.stderr, flush=True
    )
    print(run_folder)


def note_end(argv: list[str]) -> None:
    """Note an end, and exit with what it means."""
    config = load(EndConfig, argv, prog="job.py end")
    run_folder, train_steps = _run()
    found = end(run_folder, train_steps, exit_code=config.exit_code, time_limit=config.time_limit, state=config.state)
    if found.outcome is Outcome.GIVEN_UP:
        raise InputError(found.message)
    print(found.message, flush=True)
    if found.outcome is Outcome.AGAIN:
        sys.exit(AGAIN)


def _run() -> tuple[Path, int]:
    """Folder and length of the run whose configuration stands on standard input."""
    config: dict[str, Any] = yaml.safe_load(sys.stdin)
    return Path(config["observe"]["run_dir"]), config["train"]["train_steps"]


ACTIONS = {"check": check, "begin": note_begin, "end": note_end}


def main(argv: list[str]) -> None:
    """Do what the first argument names."""
    action, *rest = argv or [""]
    if action in ("-h", "--help"):
        print(f"{__doc__}\n{', '.join(ACTIONS)} have a --help of their own.")
    elif action not in ACTIONS:
        raise InputError(f"action {action!r}: must be one of {', '.join(ACTIONS)}")
    else:
        ACTIONS[action](rest)


def cli() -> None:
    """Console script emu3-job."""
    run_program(main)


if __name__ == "__main__":
    cli()

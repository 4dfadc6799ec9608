"""Commands as documents and opening comments show them."""

import re
import shlex

from tests.architecture.source import ROOT

DOCUMENTS = tuple(str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
GPUS_PER_NODE = 8
"""Ranks that slurm/env.sh gives a node, where the command line does not say."""


def command_lines(text: str) -> list[list[str]]:
    """The indented lines of `text`, as a shell splits them: continued lines joined, without comments."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(python|torchrun|bash|emu3-\S+) ", line)]


def opening_commands(text: str) -> list[list[str]]:
    """The same of a configuration's opening comment."""
    opening = re.match(r"(?:#.*\n)+", text)[0]
    return command_lines(re.sub(r"^#", "   ", opening, flags=re.MULTILINE))


def started_run(command: list[str]) -> tuple[int, list[str]] | None:
    """The ranks that a command starts, and the arguments that pretrain_emu3.py gets; None where it starts no run."""
    if command[0] == "torchrun" and "pretrain_emu3.py" in command:
        place = command.index("pretrain_emu3.py")
        return _value(command, "--nnodes", 1) * _value(command, "--nproc-per-node", 1), command[place + 1 :]
    if command[:2] == ["bash", "slurm/pretrain.sbatch"]:
        nodes, ranks = _value(command, "-N", 1), _value(command, "--ntasks-per-node", GPUS_PER_NODE)
        return nodes * ranks, command[command.index("--config") :]
    return None


def _value(command: list[str], option: str, default: int) -> int:
    return int(command[command.index(option) + 1]) if option in command else default

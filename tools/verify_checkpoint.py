"""Is a checkpoint what was written? `python tools/verify_checkpoint.py --checkpoint RUN_DIR`

Reads every file of every checkpoint there and compares checksums; of a damaged file the damaged tensors are named.
Ends with 0 where all are whole and with 1 where one is not, or cannot be verified. Nothing is changed, and no weights
are loaded. A checkpoint that a running training removes meanwhile is left out.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from megatron_ext.checkpoint.examine import damages
from megatron_ext.checkpoint.store import way_back
from megatron_ext.config import InputError, load, run_program
from megatron_ext.config.section import Name, Section

MOST_TENSORS = 10
"""Names that a line holds."""


@dataclass(frozen=True, kw_only=True)
class VerifyCheckpointConfig(Section):
    """Compare checkpoints with the checksums they were written with."""

    checkpoint: Name
    """A step_XXXXXXXX folder, a folder of them, or a run folder."""


def folders_in(place: Path) -> list[Path]:
    """The checkpoints that `place` is or holds, the oldest first.

    Raises:
        InputError: there is none.
    """
    if place.name.startswith("step_"):
        return [place]
    found = sorted(place.glob("step_*")) or sorted((place / "checkpoints").glob("step_*"))
    if not found:
        raise InputError(f"checkpoint {str(place)!r} holds no step_XXXXXXXX folder: give one, or a run folder")
    return found


def lines_about(folder: Path) -> list[str]:
    """What stands in a checkpoint's folder, in lines: one where all is well; none of a folder that is gone, as a run
    removes old checkpoints while it goes on."""
    try:
        found = damages(folder)
    except (InputError, OSError) as error:
        return [f"{folder.name}: cannot be verified; {error}"] if folder.is_dir() else []
    if not folder.is_dir():
        return []
    lines = [f"{folder.name}: {'damaged; ' + way_back(folder) if found else 'whole'}"]
    for damage in found:
        named = ", ".join(damage.tensors[:MOST_TENSORS]) + (", ..." if len(damage.tensors) > MOST_TENSORS else "")
        lines.append(f"  {damage.file} {damage.what}" + (f": {named}" if named else ""))
    return lines


def main(argv: list[str]) -> None:
    """Verify, print a line for each checkpoint and each damaged file, exit with 1 where one is not whole."""
    config = load(VerifyCheckpointConfig, argv, prog="verify_checkpoint.py")
    place = Path(config.checkpoint)
    folders = folders_in(place)
    are_whole = []
    # Lines go above the bar on a terminal, and otherwise where standard output goes.
    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        for folder in bar.track(folders, description="checkpoints"):
            lines = lines_about(folder)
            for line in lines:
                print(line, flush=True)
            are_whole += [line == f"{folder.name}: whole" for line in lines[:1]]
    if not are_whole:
        raise InputError(f"checkpoint {str(place)!r} is not there, or was removed meanwhile: give another")
    if not all(are_whole):
        sys.exit(1)


def cli() -> None:
    """Console script emu3-verify-checkpoint."""
    run_program(main)


if __name__ == "__main__":
    run_program(main)

"""Is a checkpoint what was written? `python tools/verify_checkpoint.py --checkpoint RUN_DIR`

Reads every file of every checkpoint there and compares checksums; of a damaged file the damaged tensors are named.
Ends with 0 where all are whole and with 1 where one is not. Nothing is changed, and no weights are loaded.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from megatron_ext.checkpoint.examine import damages
from megatron_ext.checkpoint.store import way_back
from megatron_ext.config import InputError, load, run_program

MOST_TENSORS = 10
"""Names that a line holds."""


@dataclass(frozen=True, kw_only=True)
class VerifyCheckpointConfig:
    """Compare checkpoints with the checksums they were written with."""

    checkpoint: str
    """A step_XXXXXXXX folder, a folder of them, or a run folder."""


def folders_in(place: Path) -> list[Path]:
    """The checkpoints that `place` is or holds, the oldest first.

    Raises:
        InputError: none.
    """
    if place.name.startswith("step_"):
        return [place]
    found = sorted(place.glob("step_*")) or sorted((place / "checkpoints").glob("step_*"))
    if not found:
        raise InputError(f"checkpoint {str(place)!r} holds no step_XXXXXXXX folder: give one, or a run folder")
    return found


def main(argv: list[str]) -> None:
    """Verify, print a line for each checkpoint and each damaged file, exit with 1 after a damage."""
    config = load(VerifyCheckpointConfig, argv, prog="verify_checkpoint.py")
    lines, is_whole = [], True
    folders, console = folders_in(Path(config.checkpoint)), Console(stderr=True)
    for folder in track(folders, description="checkpoints", transient=True, console=console):
        found = damages(folder)
        lines.append(f"{folder.name}: {'damaged; ' + way_back(folder) if found else 'whole'}")
        for damage in found:
            named = ", ".join(damage.tensors[:MOST_TENSORS]) + (", ..." if len(damage.tensors) > MOST_TENSORS else "")
            lines.append(f"  {damage.file} {damage.what}" + (f": {named}" if named else ""))
            is_whole = False
    print("\n".join(lines))
    if not is_whole:
        sys.exit(1)


def cli() -> None:
    """Console script emu3-verify-checkpoint."""
    run_program(main)


if __name__ == "__main__":
    run_program(main)

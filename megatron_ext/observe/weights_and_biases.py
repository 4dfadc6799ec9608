"""Weights & Biases, for a run that asks for it (observe.wandb_project). The only place that imports it.

A run folder is one run there, over all its starts: its id stands in RUN_DIR/wandb_run_id. Without a network
(WANDB_MODE=offline) each start leaves a folder RUN_DIR/wandb/offline-run-*, which `wandb sync` sends to that run.
History there cannot be taken back: of steps that come again after a kill or a rewind, it keeps the first values
(docs.wandb.ai, "Log objects and media": a step lower than the last is dropped). metrics.jsonl has the ones that count.
"""

import contextlib
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.config import InputError, reason_of
from megatron_ext.files import replacing
from megatron_ext.observe.writers import counted, flat

ID_FILE = "wandb_run_id"


class WeightsAndBiases:
    """Scalars and pictures of a run."""

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin the run, or go on with that of an earlier start in `folder`.

        Raises:
            InputError: the package is not installed, or the service refuses.
        """
        try:
            import wandb
        except ImportError as error:
            raise InputError(
                f"observe.wandb_project is {project!r} and wandb does not import ({error}): pip install wandb, or "
                "leave it empty"
            ) from None
        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=project,
                id=_run_id(folder / ID_FILE),
                name=folder.resolve().name,
                dir=str(folder),
                config=dict(config),
                resume="allow",
                # The console belongs to rich: wandb's way of recording it would break progress bars.
                settings=wandb.Settings(console="off", silent=True, disable_git=True),
            )
        except wandb.Error as error:
            reason = reason_of(error)
            raise InputError(
                f"observe.wandb_project {project!r} cannot be written to ({reason}): run `wandb login`, set "
                "WANDB_MODE=offline, or leave it empty"
            ) from None
        self._last = -1
        """Last step that was logged by this start."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Log every number of `record` under its key, `timing` as `timing/NAME`, at `record["step"]`."""
        numbers = {name: value for name, value in flat(counted(record)).items() if isinstance(value, int | float)}
        self._log({name: value for name, value in numbers.items() if name != "step"}, record["step"])

    def truncate_after(self, step: int) -> None:
        """What was sent stays there; the steps that come again are not sent."""

    def write_picture(self, name: str, path: Path, step: int) -> None:
        """Log the picture file at `path`."""
        self._log({name: self._wandb.Image(str(path))}, step)

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if step >= self._last:  # wandb would drop it too, and say so at each step
            self._last = step
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is left and end the start; while an exception ends it, the run is marked as failed."""
        self._run.finish(exit_code=int(sys.exc_info()[0] is not None))


def _run_id(path: Path) -> str:
    """The run's id: that of an earlier start, or a new one, which is written down."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8").strip()
    run_id = uuid.uuid4().hex[:12]
    with replacing(path) as temporary:
        temporary.write_text(run_id + "\n", encoding="utf-8")
    return run_id

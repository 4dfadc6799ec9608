"""The run folder: configuration, provenance.json, metrics.jsonl, events.jsonl, tensorboard/; the console of the run."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from megatron_ext.config import InputError
from megatron_ext.config.observe import ObserveConfig
from megatron_ext.files import alone_in, read_json_lines, replacing, writing
from megatron_ext.observe.profile import Profiler
from megatron_ext.observe.provenance import append_provenance, collect_provenance
from megatron_ext.observe.weights_and_biases import WeightsAndBiases
from megatron_ext.observe.writers import ConsoleLines, JsonLines, TensorBoard
from megatron_ext.runtime import Topology
from megatron_ext.runtime.precision import Precision

EVENTS = "events.jsonl"
"""Of the files that are never replaced: it carries the lock of the folder."""


class Run:
    """Writes what a run tells. Every rank holds one; only the main rank's writes and prints, so no caller asks."""

    def __init__(
        self, observe: ObserveConfig, *, is_main: bool, config_yaml: str, total_steps: int | None = None
    ) -> None:
        """Use `Run.open`."""
        self._observe = observe
        self.folder = Path(observe.run_dir)
        self.console = Console(quiet=not is_main, highlight=False)
        self._writers: list[JsonLines | TensorBoard | WeightsAndBiases | ConsoleLines] = []
        self._events: JsonLines | None = None
        self._config_yaml = config_yaml
        self._config = yaml.safe_load(config_yaml)
        self.provenance: dict[str, Any] = collect_provenance(self._config) if is_main else {}
        """Where this start comes from; empty on other ranks than the main one."""
        if is_main:
            self._writers = [
                JsonLines(self.folder / "metrics.jsonl"),
                ConsoleLines(self.console, observe.log_interval, total_steps),
            ]
            if observe.tensorboard:
                self._writers.append(TensorBoard(self.folder / "tensorboard"))
            if observe.wandb_project:
                self._writers.append(WeightsAndBiases(observe.wandb_project, self.folder, self._config))
            self._events = JsonLines(self.folder / EVENTS)

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        observe: ObserveConfig,
        is_main: bool,
        config_yaml: str,
        *,
        total_steps: int | None = None,
        environment: Mapping[str, Any] | None = None,
    ) -> Iterator["Run"]:
        """Open the run folder and log event `start`: configuration, `environment` (versions, threads, layout),
        and where the start comes from. Another start in the folder is waited for.

        `total_steps` gives the console its `step n/total` and ETA. A start that ends by an exception logs event
        `failure` with it.

        Raises:
            InputError: the folder cannot be written, or another start does not end.
        """
        with contextlib.ExitStack() as held:
            with writing(observe.run_dir, "observe.run_dir"):
                if is_main:
                    Path(observe.run_dir).mkdir(parents=True, exist_ok=True)
                    held.enter_context(alone_in(Path(observe.run_dir) / EVENTS, print))
                run = cls(observe, is_main=is_main, config_yaml=config_yaml, total_steps=total_steps)
            run.log_event("start", environment=environment or {}, config=run._config, provenance=run.provenance)
            try:
                yield run
            except BaseException as error:
                with contextlib.suppress(InputError):  # a full disk may be the failure
                    run.log_event("failure", error=f"{type(error).__name__}: {error}")
                raise
            finally:
                run.close()

    def log_metrics(self, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, TensorBoard scalars, and a console line when one is due.

        `metrics` holds `step`; a training line holds `loss`, an evaluation's only `valid_*`. Whatever depends on the
        wall clock stands under `timing`, so that two equal runs differ nowhere else.

        Raises:
            InputError: the folder cannot be written, such as on a full disk.
        """
        with self._writing():
            for writer in self._writers:
                writer.write(metrics)

    def log_picture(self, name: str, path: Path, *, step: int) -> None:
        """Show the picture file at `path` under `name` in TensorBoard, and in Weights & Biases."""
        for writer in self._writers:
            if isinstance(writer, TensorBoard | WeightsAndBiases):
                writer.write_picture(name, path, step)

    def log_event(self, kind: str, **fields: Any) -> None:
        """One line of events.jsonl: what happened and when (seconds since 1970). Raises as `log_metrics` does."""
        if self._events is not None:
            with self._writing():
                self._events.write({"event": kind, "time": round(time.time(), 3), **fields})

    def tell_precision(self, precision: Precision) -> None:
        """Say what the run computes in and why, on the console and in the start's provenance."""
        self.console.print(precision.line, markup=False, soft_wrap=True)
        self.add_provenance(precision=precision.facts)

    def add_provenance(self, **facts: Any) -> None:
        """What is known only after the start, such as identities; before `truncate_after`, which writes it."""
        if self._events is not None:
            self.provenance.update(facts)

    def truncate_after(self, step: int) -> None:
        """Forget the metrics after `step`, where this start resumes (0: a new run), write config.yaml and the start's
        entry of provenance.json, log `resume`.

        Call it once, before the first `log_metrics` and when nothing can be refused any more: the steps a killed start
        did after its last checkpoint come again, and a mistyped start leaves the run's config.yaml as it was.
        """
        if self._events is not None:
            with replacing(self.folder / "config.yaml") as temporary:
                temporary.write_text(self._config_yaml, encoding="utf-8")
            append_provenance(self.folder, {"step": step, **self.provenance, "config": self._config})
        self.log_event("resume", step=step, **self._signs_of_life_after(step))
        self.forget_after(step)

    def _signs_of_life_after(self, step: int) -> dict[str, Any]:
        """How many steps after `step` earlier starts did, and when the last line was written (seconds since 1970)."""
        path = self.folder / "metrics.jsonl"
        if self._events is None or not path.exists() or not path.stat().st_size:
            return {}
        steps = {record["step"] for record in read_json_lines(path) if "loss" in record}
        forgotten = sum(number > step for number in steps)
        return {"forgotten_steps": forgotten, "last_metrics": round(path.stat().st_mtime, 3)}

    def forget_after(self, step: int) -> None:
        """Forget the metrics after `step`: the steps come again."""
        for writer in self._writers:
            if not isinstance(writer, ConsoleLines):
                writer.truncate_after(step)

    @contextlib.contextmanager
    def profiler(self, topology: Topology) -> Iterator[Profiler]:
        """Profiles the steps that the section asks for; traces go to profile/."""
        profiler = Profiler(self._observe, self.folder / "profile", topology, self.console)
        try:
            yield profiler
        finally:
            profiler.close()

    def close(self) -> None:
        """Flush and close all files."""
        with self._writing():
            for writer in (*self._writers, self._events):
                if isinstance(writer, JsonLines | TensorBoard | WeightsAndBiases):
                    writer.close()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing(self._observe.run_dir, "observe.run_dir")

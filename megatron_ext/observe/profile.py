"""Traces of some steps: torch.profiler, and on a GPU the history of its memory."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from megatron_ext.config.errors import InputError
from megatron_ext.config.observe import ObserveConfig
from megatron_ext.runtime import Topology
from megatron_ext.runtime.device import dump_memory_history, profiler_activities, record_memory_history


class Profiler:
    """Profiles the steps [profile_step_start, profile_step_end) of a run on the ranks in profile_ranks."""

    def __init__(self, observe: ObserveConfig, folder: Path, topology: Topology, console: Console) -> None:
        """Raises InputError for memory history without a GPU."""
        start = observe.profile_step_start
        end = observe.profile_step_end if observe.profile_step_end is not None or start is None else start + 1
        if observe.record_memory_history and topology.device.type == "cpu":
            raise InputError("observe.record_memory_history is true and there is no GPU: set it to false")
        self._window = (start, end) if topology.rank in observe.profile_ranks else (None, None)
        self._with_memory = observe.record_memory_history
        self._folder = folder
        self._topology = topology
        self._console = console
        self._profile: torch.profiler.profile | None = None

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around optimizer step `step`: profiled when it lies in the window, written when it is the last of it."""
        first, end = self._window
        if step == first:
            self._start()
        yield
        if self._profile is not None and step + 1 == end:
            self._finish()

    def close(self) -> None:
        """Write what a run that stops inside the window has profiled."""
        if self._profile is not None:
            self._finish()

    def _start(self) -> None:
        self._profile = torch.profiler.profile(
            activities=profiler_activities(self._topology.device), record_shapes=True, profile_memory=True
        )
        if self._with_memory:
            record_memory_history(enabled=True)
        self._profile.start()

    def _finish(self) -> None:
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = self._folder / f"rank{self._topology.rank}_step{self._window[0]}"
        self._profile.export_chrome_trace(f"{stem}.trace.json.gz")
        if self._with_memory:
            dump_memory_history(f"{stem}.memory.pickle")
            record_memory_history(enabled=False)
        self._profile = None
        self._console.print(f"profile written to {self._folder}", markup=False)

"""Why a run saves and stops before its last step: a signal, a file, the clock. Agreed across ranks after a step."""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from megatron_ext.resilience.signals import StopRequest
from megatron_ext.runtime import Topology

STOP_FILE = "stop"
"""`touch RUN_DIR/stop` asks a run to save and stop; the run removes it."""


class Limits(Protocol):
    """When a start ends although nobody asks."""

    @property
    def exit_interval(self) -> int | None:
        """A step divisible by this is the start's last."""

    @property
    def exit_duration(self) -> float | None:
        """Minutes after which the start ends."""


class Stopping:
    """Judges after every step whether the run ends there."""

    def __init__(self, train: Limits, run_folder: Path, topology: Topology, signals: StopRequest) -> None:
        self._train = train
        self._file = run_folder / STOP_FILE
        self._topology = topology
        self._signals = signals
        self._started = time.monotonic()

    @classmethod
    @contextlib.contextmanager
    def watch(
        cls, train: Limits, run_folder: Path, topology: Topology, earlier: StopRequest | None = None
    ) -> Iterator["Stopping"]:
        """Listen for SIGTERM and Ctrl-C while open; what `earlier` has heard by then counts too."""
        with StopRequest.on_signals(signal.SIGTERM, signal.SIGINT) as signals:
            if earlier is not None and earlier.requested:
                signals.signal_name = earlier.signal_name
            yield cls(train, run_folder, topology, signals)

    def reason(self, step: int) -> str | None:
        """Why the run stops after `step`, as the lowest rank that knows says it, on every rank; None to go on."""
        if self._train.exit_interval and step % self._train.exit_interval == 0:
            return f"train.exit_interval {self._train.exit_interval}"
        mine = self._own_reason()
        if not self._topology.any(mine is not None):
            return None
        if self._topology.is_main:
            self._file.unlink(missing_ok=True)
        reasons = self._topology.gather(mine)
        return self._topology.from_main(lambda: next(reason for reason in reasons if reason is not None))

    def _own_reason(self) -> str | None:
        """What this rank sees. Only the main rank looks for the file: one look per step is enough for a file system."""
        if self._signals.signal_name is not None:
            return self._signals.signal_name
        if self._topology.is_main and self._file.exists():
            return f"file {self._file}"
        minutes = (time.monotonic() - self._started) / 60
        if self._train.exit_duration is not None and minutes >= self._train.exit_duration:
            return f"train.exit_duration {self._train.exit_duration:g} minutes"
        return None

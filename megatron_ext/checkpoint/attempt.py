"""One attempt to save a sharded state: planned by megatron-core, written by a process of each rank, agreed by all.

megatron-core's own queue of writers (AsyncCallsQueue) is not used: docs/checkpoints.md lists what it lacks.
"""

import inspect
import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_ext.checkpoint.manifest import FileRecord, record_of, sync_to_disk
from megatron_ext.checkpoint.store import CheckpointStore
from megatron_ext.checkpoint.writer import WriteError, Writer
from megatron_ext.runtime import Topology

WEIGHTS = "decoder"
"""Folder of the sharded state in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class SaveOutcome:
    """How an attempt ended; the same on every rank, but for the words of `failure`."""

    step: int
    folder: Path | None
    """The checkpoint; None where there is none."""

    failure: str | None
    """Why there is none: rank 0 knows the reasons of all."""

    seconds: float
    """From the request to the end."""

    blocked_seconds: float
    """How long training stood still for it."""


class _PlannedSave(TorchDistSaveShardedStrategy):
    """megatron-core's save up to its plan; `storage` and `plan` are what completes it when all is written."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)
        self.storage: Any = None
        self.plan: Any = None
        """torch's Metadata of all ranks' shards; rank 0 has it."""

    def _get_save_and_finalize_callbacks(self, writer: Any, prepared: Any, *strategy: str) -> Any:
        self.storage, self.plan = writer, prepared[1]
        return super()._get_save_and_finalize_callbacks(writer, prepared, *strategy)


class SaveAttempt:
    """Checkpoint `step` in the making. Every rank makes one and calls its methods together with the others."""

    def __init__(self, step: int, store: CheckpointStore, topology: Topology, *, timeout_s: float) -> None:
        self.step = step
        self.store = store
        self.topology = topology
        self.timeout_s = timeout_s
        self._began = time.monotonic()
        self._blocked = 0.0
        self._partial = Path()
        self._save = _PlannedSave()
        self._writer: Writer | None = None
        self._results: Any = None
        self._failure: str | None = None

    def refuse(self, fault: str | None) -> bool:
        """Whether a rank knows a `fault` of what would be saved: nothing is written then, and `poll` says why."""
        self._failure = fault
        refused = self.topology.any(fault is not None)
        if refused:
            self._blocked = time.monotonic() - self._began
        return refused

    def start(self, sharded: dict[str, Any], prepare: Callable[[Path], None], *, in_background: bool) -> None:
        """Take the state as it is now and begin to write it; `prepare(folder)` adds files, on the main rank.

        Without `in_background` all of this rank's files are written when this returns.
        """
        try:
            self._partial = self.store.begin(self.step)
            self.topology.from_main(lambda: self._prepare(prepare))
        except OSError as error:  # raised on every rank
            self._failure = str(error)
        else:
            write = self._plan(sharded)
            try:
                if in_background and write is not None:
                    self._writer = Writer(write)
                elif write is not None:
                    self._results = write()
            except OSError as error:
                self._failure = str(error)
        self._blocked = time.monotonic() - self._began

    def poll(self, metadata: Mapping[str, Any]) -> SaveOutcome | None:
        """None while a rank still writes; else the checkpoint is made, or the attempt given up, on all ranks alike."""
        entered = time.monotonic()
        finished = self._writer is None or self._writer.finished()
        self._note_result(finished)
        folder, failure = None, None
        if self.topology.any(self._failure is not None):
            failure = self._give_up()
        elif self.topology.any(not finished):
            self._blocked += time.monotonic() - entered
            return None
        else:
            folder, failure = self._commit(metadata)
        now = time.monotonic()
        return SaveOutcome(
            step=self.step,
            folder=folder,
            failure=failure,
            seconds=round(now - self._began, 3),
            blocked_seconds=round(self._blocked + now - entered, 3),
        )

    def _prepare(self, prepare: Callable[[Path], None]) -> None:
        (self._partial / WEIGHTS).mkdir()
        prepare(self._partial)

    def _plan(self, sharded: dict[str, Any]) -> Callable[[], Any] | None:
        """What writes this rank's share; None where it has none."""
        # Where megatron-core would start a server process for the results of its writers: nothing of ours goes there.
        filesystem_async._results_queue = queue.SimpleQueue()
        options = {"async_sharded_save": True, "sharded_strategy": self._save}
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
            options["async_strategy"] = "mcore"  # since 0.19 the default is another package
        request = dist_checkpointing.save(sharded, str(self._partial / WEIGHTS), **options)
        if request.async_fn is None:
            return None
        transforms = request.async_fn.args[0]
        buckets = [_on_host(bucket) for bucket in request.async_fn_args[1]]
        # The plan keeps their number; the tensors would be held until the end.
        self._save.storage.write_buckets = [None] * len(buckets)
        return lambda: _write(transforms, buckets)

    def _note_result(self, finished: bool) -> None:
        if self._failure is None and self._writer is not None:
            if finished and self._results is None:
                try:
                    self._results = self._writer.result()
                except OSError as error:
                    self._failure = str(error)
            elif not finished and time.monotonic() - self._began > self.timeout_s:
                self._failure = f"not written within checkpoint.save_timeout_s {self.timeout_s:g}"

    def _give_up(self) -> str:
        """Why, and no writer any more."""
        if self._writer is not None:
            self._writer.kill()
        reasons = self.topology.gather(self._failure)
        if reasons is None:
            return self._failure or "it failed on another rank"
        return "; ".join(f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason is not None)

    def _commit(self, metadata: Mapping[str, Any]) -> tuple[Path | None, str | None]:
        """The checkpoint's folder, or why there is none."""
        shares = self.topology.gather(self._results or ([], {}))

        def complete() -> dict[str, FileRecord]:
            # As megatron-core's own finalization does it, with the writers' results from where ours leave them.
            self._save.storage.finish(self._save.plan, [results for results, _ in shares])
            save_config(CheckpointingConfig(self._save.backend, self._save.version), str(self._partial / WEIGHTS))
            return {f"{WEIGHTS}/{name}": record for _, files in shares for name, record in files.items()}

        try:
            written = self.topology.from_main(complete)
            return self.store.commit(self._partial, self.step, metadata, written), None
        except OSError as error:  # raised on every rank
            return None, str(error)


def _on_host(bucket: tuple) -> tuple:
    """The bucket with its tensors in host memory; into pageable memory and at once: pinned memory is not copied by a
    fork, and a copy still in flight would be overtaken by training.
    """
    path, name, (texts, tensors) = bucket
    return path, name, (texts, [(item, tensor.to("cpu")) for item, tensor in tensors])


def _write(transforms: list[Any], buckets: list[tuple]) -> tuple[list[Any], dict[str, FileRecord]]:
    """Write the files, force them to disk and read them back: torch's results, and name -> record."""
    results, files = [], {}
    for index, bucket in enumerate(buckets):
        done, pending = queue.SimpleQueue(), queue.Queue()
        pending.put(index)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, index, bucket, results_queue=done, count_queue=pending, use_fsync=True
        )
        _, outcome = done.get()
        if isinstance(outcome, Exception):
            raise WriteError(f"{type(outcome).__name__}: {outcome}") from outcome
        path, name, _ = bucket
        results += outcome
        files[name] = record_of(Path(path))
        sync_to_disk(Path(path).parent)
    return results, files

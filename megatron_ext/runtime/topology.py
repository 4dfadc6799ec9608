"""Start and stop torch.distributed and megatron-core's process groups; the result is a `Topology`."""

import contextlib
import datetime
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_ext.config.errors import InputError
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.config.validate import layout_fault
from megatron_ext.processes import stop_with_launcher
from megatron_ext.runtime.cpu import adapt_to_cpu, check_version
from megatron_ext.runtime.device import (
    PRECISIONS,
    backend_for,
    bind,
    choose_device,
    make_deterministic,
    set_threads,
)
from megatron_ext.runtime.meeting import meet
from megatron_ext.runtime.precision import Precision, settle_precision

BROADCAST_BYTES = 1 << 28
"""Sent at once of a large array: below the 32-bit lengths that a backend may count in."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Where this rank stands. An axis is parallel (tensor, context, data); every other room is given this, none
    fetches groups."""

    device: torch.device
    precision: Precision
    """In what to compute: runtime.precision, settled."""

    dtype: torch.dtype
    """Type of weights and activations."""

    fp8_recipe: str | None
    """How the layers' matrix products scale their 8-bit operands; None where they have none."""

    deterministic: bool
    """Whether only bitwise repeatable kernels may run."""

    rank: int
    world_size: int
    tensor_parallel_rank: int
    tensor_parallel_size: int
    context_parallel_rank: int
    context_parallel_size: int
    data_parallel_rank: int
    data_parallel_size: int
    groups: ProcessGroupCollection

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what only one may write."""
        return self.rank == 0

    @property
    def layout(self) -> dict[str, int]:
        """The sizes of the parallel axes."""
        names = ("tensor_parallel_size", "context_parallel_size", "data_parallel_size")
        return {name: getattr(self, name) for name in names}

    @property
    def environment(self) -> dict[str, Any]:
        """What two starts must have in common to compute the same bits."""
        return {
            "torch": torch.__version__,
            "megatron_core": check_version(),
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "world_size": self.world_size,
            "layout": self.layout,
        }

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        return _broadcast(value)

    def broadcast_large(self, value: Any) -> Any:
        """`broadcast` of what is mostly numpy arrays: they are sent from where they lie and received where they stay,
        without the two further copies that a pickle of them is."""
        if self.world_size == 1:
            return value
        buffers: list[pickle.PickleBuffer] = []
        frame = pickle.dumps(value, protocol=5, buffer_callback=buffers.append) if self.is_main else b""
        frame, sizes = self.broadcast((frame, [buffer.raw().nbytes for buffer in buffers]))
        arrays = [np.asarray(buffer.raw()) for buffer in buffers] or [np.empty(size, np.uint8) for size in sizes]
        for array in arrays:
            for piece in torch.from_numpy(array).split(BROADCAST_BYTES):
                dist.broadcast(piece, src=0)
        return value if self.is_main else pickle.loads(frame, buffers=arrays)

    def from_main(self, compute: Callable[[], Any]) -> Any:
        """What `compute()` returns on rank 0, on every rank; an InputError or OSError of it is raised on every rank."""
        return _from_main(compute)

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's `value` in rank order, on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, dst=0)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on at least one rank; the same answer everywhere."""
        if self.world_size == 1:
            return flag
        seen = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return bool(seen.item())

    @staticmethod
    def start(
        runtime: RuntimeConfig, parallel: ParallelConfig, *, begun_in: Callable[[], str | None] = lambda: None
    ) -> contextlib.AbstractContextManager["Topology"]:
        """Join the ranks that torchrun started (one process without it) and lay the parallel axes over them.

        Rank 0 settles runtime.precision for all: `begun_in()` is what the run to go on with computes in, None for a
        new one.

        Raises:
            InputError: the parallel sizes do not divide the world size, or the device is not to be had.
        """
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        return _laid_out(runtime, parallel, rank, world_size, begun_in)

    @staticmethod
    def alone(runtime: RuntimeConfig) -> contextlib.AbstractContextManager["Topology"]:
        """This process by itself, also among ranks that torchrun started: what one process computes, on each of them.

        Raises:
            InputError: the device is not to be had.
        """
        return _laid_out(runtime, ParallelConfig(), rank=0, world_size=1)


@contextlib.contextmanager
def _laid_out(
    runtime: RuntimeConfig,
    parallel: ParallelConfig,
    rank: int,
    world_size: int,
    begun_in: Callable[[], str | None] = lambda: None,
) -> Iterator[Topology]:
    stop_with_launcher()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    check_layout(parallel, world_size)
    device = choose_device(runtime, local_rank)
    check_version()
    if device.type == "cpu":
        adapt_to_cpu()
    set_threads(runtime, device, local_world_size)
    bind(device)
    if runtime.deterministic:
        make_deterministic(device)
    _join(runtime, device, rank, world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            distributed_timeout_minutes=runtime.distributed_timeout_s / 60,
        )
        precision = _from_main(lambda: settle_precision(runtime.precision, device, begun_in=begun_in))
        yield _describe(runtime, device, precision)
        # gloo aborts the process when a peer is gone before its last message was read: leave together.
        dist.barrier()
    finally:
        parallel_state.destroy_model_parallel()
        # NCCL parts when its peers do, and those may wait for a rank that failed: the end of its process aborts.
        if sys.exception() is None or device.type == "cpu" or world_size == 1:
            dist.destroy_process_group()
        # megatron-core keeps rotary frequencies by context group (an lru_cache), and a group that is kept its threads.
        RotaryEmbedding.forward.cache_clear()


def check_layout(parallel: ParallelConfig, world_size: int) -> None:
    """Raise InputError unless the parallel sizes lay out over `world_size` ranks."""
    if fault := layout_fault(parallel, world_size):
        raise InputError(fault)


def _join(runtime: RuntimeConfig, device: torch.device, rank: int, world_size: int) -> None:
    timeout = datetime.timedelta(seconds=runtime.distributed_timeout_s)
    if world_size == 1:  # meets nobody, and leaves the launcher's store untouched
        where = {"store": dist.HashStore(), "rank": rank, "world_size": world_size}
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timeout)
        where = {
            "store": dist.PrefixStore(meet(store, rank, world_size), store),
            "rank": rank,
            "world_size": world_size,
        }
    else:
        where = {}
    dist.init_process_group(backend_for(device), timeout=timeout, **where)


def _broadcast(value: Any) -> Any:
    values = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def _from_main(compute: Callable[[], Any]) -> Any:
    outcome = None
    if dist.get_rank() == 0:
        try:
            outcome = compute()
        except (InputError, OSError) as error:
            outcome = error
    outcome = _broadcast(outcome)
    if isinstance(outcome, InputError | OSError):
        raise outcome
    return outcome


def _describe(runtime: RuntimeConfig, device: torch.device, precision: Precision) -> Topology:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Topology(
        device=device,
        precision=precision,
        dtype=PRECISIONS[precision.name],
        fp8_recipe=runtime.fp8_recipe if precision.name == "fp8" else None,
        deterministic=runtime.deterministic,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_parallel_rank=groups.tp.rank(),
        tensor_parallel_size=groups.tp.size(),
        context_parallel_rank=groups.cp.rank(),
        context_parallel_size=groups.cp.size(),
        data_parallel_rank=groups.dp.rank(),
        data_parallel_size=groups.dp.size(),
        groups=groups,
    )

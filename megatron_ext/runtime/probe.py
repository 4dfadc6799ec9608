"""Measurements of a rank's device, of the links between ranks and of their clocks; who is missing."""

import hashlib
import importlib.metadata
import os
import platform
import socket
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore

from megatron_ext.runtime.cpu import check_version
from megatron_ext.runtime.device import synchronize
from megatron_ext.runtime.hardware import describe_hardware
from megatron_ext.runtime.topology import Topology

REPEATS = 5
"""Of a measurement; the best one counts, the others were disturbed."""

CONNECT_S = 20.0
"""Seconds to find the store of torchrun's agent."""


class Roll:
    """How far each rank has come, in the store of torchrun's agent, which outlives the ranks."""

    def __init__(self) -> None:
        """Without torchrun there is one rank, and nobody to miss."""
        self._rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._store = None
        if self.size > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            wait = timedelta(seconds=CONNECT_S)
            store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=wait)
            self._store = PrefixStore(f"roll/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def reach(self, stage: int) -> None:
        """This rank has come to `stage`."""
        if self._store is not None:
            self._store.set(f"{stage}/{self._rank}", host_name())

    def missing(self, stage: int, patience_s: float) -> dict[int, str | None]:
        """Ranks that do not come to `stage` in time, with their nodes as far as they ever said; empty when all do."""
        deadline = time.monotonic() + patience_s
        late = set(range(self.size)) if self._store is not None else set()
        while late := {rank for rank in late if not self._store.check([f"{stage}/{rank}"])}:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return {rank: self._node(rank) for rank in sorted(late)}

    def nodes(self) -> set[str]:
        """Nodes from which any rank has been heard."""
        return {node for rank in range(self.size) if (node := self._node(rank)) is not None}

    def _node(self, rank: int) -> str | None:
        key = f"0/{rank}"
        return self._store.get(key).decode() if self._store is not None and self._store.check([key]) else None


def host_name() -> str:
    """The node's name, as Slurm knows it where it does."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def software(device: torch.device) -> dict[str, str]:
    """What must be the same on all ranks: versions, and what the device is."""
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": check_version(),
        "transformer-engine": _version("transformer-engine"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = f"{properties.name}, {round(properties.total_memory / 2**30)} GiB"
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        hardware = describe_hardware()
        facts["GPUs and driver"] = "; ".join(hardware["gpus"]) or "none"
        facts["node"] = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB"
    return facts


def free_memory_share(device: torch.device) -> float | None:
    """Of a GPU's memory; None for a CPU, which shares the node's."""
    if device.type == "cpu":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return free / total


def matrix_product(device: torch.device) -> tuple[float, str]:
    """(TFLOP/s, digest of the result) of a product of two matrices that are the same on every rank."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    draws = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=draws).to(device, dtype) for _ in range(2))
    seconds = _best_seconds(lambda: left @ right, device)
    corner = (left @ right)[:512, :512].float().cpu().contiguous()
    return 2 * size**3 / seconds / 1e12, hashlib.sha256(corner.numpy().tobytes()).hexdigest()[:12]


def bandwidths(topology: Topology) -> tuple[dict[str, float], dict[str, tuple[int, ...]]]:
    """Axis -> GB/s of an all-reduce as the bus sees it (bytes x 2 (n - 1) / n, as nccl-tests counts), and axis ->
    ranks of this rank's group; axes of size 1 are left out."""
    found, peers = {}, {}
    groups = {"tensor": topology.groups.tp, "context": topology.groups.cp, "data": topology.groups.dp}
    size = 2**28 if topology.device.type == "cuda" else 2**22
    for axis, group in groups.items():
        if group.size() > 1:
            numbers = torch.ones(size // 4, device=topology.device)
            seconds = _best_seconds(
                lambda numbers=numbers, group=group: dist.all_reduce(numbers, group=group), topology.device
            )
            found[axis] = size * 2 * (group.size() - 1) / group.size() / seconds / 1e9
            peers[axis] = tuple(dist.get_process_group_ranks(group))
    return found, peers


def clock_at_barrier(topology: Topology) -> float:
    """The time of day when this rank leaves a barrier, in seconds: ranks leave it within milliseconds."""
    topology.barrier()
    synchronize(topology.device)
    return time.time()


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    work()
    best = float("inf")
    for _ in range(REPEATS):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"

"""The torch device and what depends on its kind: backend, synchronization, memory, threads."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config.errors import InputError
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.config.validate import precision_fault

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Type of weights and activations; fp8 is inside the layers' matrix products."""


def choose_device(runtime: RuntimeConfig, local_rank: int) -> torch.device:
    """The device of this rank. Raises InputError when CUDA is asked for and absent, or a rank has no GPU of its own."""
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is 'cuda' and no GPU is visible: set it to cpu or auto")
    if runtime.device == "cpu" or not torch.cuda.is_available():
        if fault := precision_fault(runtime.precision, on_gpu=False):
            raise InputError(fault)
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local_rank} has no GPU of its own ({torch.cuda.device_count()} visible): "
            "start at most one rank per GPU"
        )
    return torch.device("cuda", local_rank)


def backend_for(device: torch.device) -> str:
    """Name of the torch.distributed backend. CUDA ranks keep gloo for objects and CPU tensors."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def bind(device: torch.device) -> None:
    """Make `device` the current one for code that asks torch for it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """While it is open, networks with fp32 weights compute in `precision`: fp32 or bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=PRECISIONS[precision] == torch.bfloat16)


def synchronize(device: torch.device) -> None:
    """Wait for queued kernels, so that a clock read afterwards is honest. Nothing is queued on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class OwnCopies:
    """Copies of memory whose owner writes it again as soon as it is let."""

    def __init__(self, gpu: int | None) -> None:
        """`gpu` is where the memory is, None for the CPU's."""
        self._stream = None if gpu is None else torch.cuda.Stream(gpu)

    def take(self, foreign: Iterable[Any]) -> list[torch.Tensor]:
        """A copy of everything in `foreign` (DLPack), which is complete when this returns.

        On a GPU that holds whatever the caller's stream has still to do: the copies are made on a stream of their own
        and waited for there, so that neither the owner can be too early nor a training's kernels are waited for.
        """
        if self._stream is None:
            return [torch.from_dlpack(item).clone() for item in foreign]
        readers = torch.cuda.current_stream(self._stream.device)
        with torch.cuda.stream(self._stream):
            copies = [torch.from_dlpack(item).clone() for item in foreign]
        self._stream.synchronize()
        for copy in copies:
            # Their memory is the copying stream's again when torch frees them: not before the caller's has read it.
            copy.record_stream(readers)
        return copies


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use since the start or `reset_peak_memory`: allocator peak on CUDA, resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident_bytes("VmHWM")


def memory_used(device: torch.device) -> int:
    """Memory in use now, counted as `peak_memory_bytes` does."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _resident_bytes("VmRSS")


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_bytes` count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM


def _resident_bytes(field: str) -> int:
    """A kB field of proc(5)'s status of this process; unlike getrusage's, not inherited from the parent."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def set_threads(runtime: RuntimeConfig, device: torch.device, local_world_size: int) -> None:
    """Share the cores among the ranks of a machine: two ranks of all cores each halve each other's speed."""
    cores = len(os.sched_getaffinity(0))
    if device.type == "cpu":
        torch.set_num_threads(runtime.num_threads or max(1, cores // local_world_size))


def keep_to_one_core() -> None:
    """Let torch's operations in the calling thread take one core: for threads beside the one that trains.

    Each thread that splits operations has helpers of its own. Once there are more of them than cores, all wait asleep
    instead of spinning (libgomp manual, GOMP_SPINCOUNT), and steps of many small operations take 1.7 times as long.
    Threads that meet torch later for the first time keep to one core as well.
    """
    torch.set_num_threads(1)


def make_deterministic(device: torch.device) -> None:
    """Ask torch, cuBLAS, NCCL and Transformer Engine for kernels that repeat bit for bit; before the first of them."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch: notes/randomness
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
        os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)


def profiler_activities(device: torch.device) -> list[torch.profiler.ProfilerActivity]:
    """What torch.profiler records on `device`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return activities


def record_memory_history(*, enabled: bool) -> None:
    """Start or stop recording the allocations of this rank's GPU."""
    torch.cuda.memory._record_memory_history("all" if enabled else None)


def dump_memory_history(path: str) -> None:
    """Write what was recorded, for pytorch.org/memory_viz."""
    torch.cuda.memory._dump_snapshot(path)

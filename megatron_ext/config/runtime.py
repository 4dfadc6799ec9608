"""Section `runtime`: device, precision and process limits."""

from dataclasses import dataclass
from typing import Literal

DeviceName = Literal["auto", "cpu", "cuda"]
"""What a program's `device` option may be."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Device, precision and process limits."""

    device: DeviceName = "auto"
    """Where to compute; auto takes CUDA when a GPU is visible (NCCL), else the CPU (gloo)."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of weights and activations; bf16 keeps fp32 master weights in the optimizer."""

    num_threads: int = 0
    """CPU threads per rank; 0 shares the machine's cores evenly among its ranks."""

    distributed_timeout_s: int = 600
    """Seconds after which a collective that does not finish ends the job."""

"""What the machine of this process is made of."""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil

NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
TIMEOUT_S = 20
"""A driver in trouble may never answer."""


def describe_hardware() -> dict[str, Any]:
    """CPU, cores this process may use, memory in GiB, and the GPUs of the machine with their driver.

    Asks the driver's own program: torch would start a context on a GPU, also for a run that uses none.
    """
    return {
        "cpu": _cpu_info("model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpus": _gpus(),
    }


def cpu_flags() -> frozenset[str]:
    """What the CPU can do, in the names of /proc/cpuinfo; empty where that does not say."""
    return frozenset(_cpu_info("flags").split())


def _cpu_info(field: str) -> str:
    """The field of the first processor in /proc/cpuinfo; empty where it is not there."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    named = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in named if name.strip() == field), "")


def _gpus() -> list[str]:
    """One line per GPU: name, memory, driver."""
    if shutil.which(NVIDIA_SMI[0]) is None:
        return []
    try:
        listing = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listing.splitlines() if line.strip()]

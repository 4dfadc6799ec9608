"""In what a run computes. What `precision: auto` becomes is decided here, once, before any room reads it."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from megatron_ext.config.validate import possible_precisions, precision_fault
from megatron_ext.runtime.hardware import cpu_flags

BF16_FLAGS = ("avx512_bf16", "amx_bf16")
"""Of /proc/cpuinfo: instructions that multiply bf16. Without them it is widened, multiplied and rounded in software."""

LIMITS_WITHOUT_BF16 = {"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"}
"""Values of ONEDNN_MAX_CPU_ISA that keep oneDNN, which multiplies for torch, from those instructions (oneDNN's guide,
CPU dispatcher control). It ignores the case, and a value that it does not know."""

SLOWER = "3 (vision tokenizer) to 7 (decoder)"
"""Times that a step in bf16 takes of one in fp32 where the CPU does not multiply bf16: the quickstart's networks, two
cores of an EPYC with AVX2 (docs/performance.md)."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """In what a run computes, and why."""

    name: str
    """fp32, bf16 or fp8."""

    asked: str
    """What the configuration says: one of these, or auto."""

    reason: str
    """Why it is this one; what it costs, where it costs more than another."""

    @property
    def line(self) -> str:
        """For the console."""
        return f"computing in {self.name}: {self.reason}"

    @property
    def facts(self) -> dict[str, str]:
        """For provenance.json."""
        return asdict(self)


def settle_precision(
    asked: str,
    device: torch.device,
    *,
    begun_in: Callable[[], str | None] = lambda: None,
    fault_of: Callable[..., str | None] = precision_fault,
) -> Precision:
    """What to compute in on `device` where `asked` is what the configuration says.

    auto is what the checkpoint to go on from was trained in (`begun_in()`, None for a new run), unless `fault_of` says
    that this device cannot go on in it; else bf16 where the device multiplies it, and fp32 where it does not.
    """
    natural, why = _natural(device)
    if asked != "auto":
        slow = (asked, natural, device.type) == ("bf16", "fp32", "cpu")
        cost = f", but {why}: a step takes {SLOWER} times as long as in fp32, which auto would take" if slow else ""
        return Precision(name=asked, asked=asked, reason="as configured" + cost)
    begun = begun_in()
    if begun is None or begun == natural:
        return Precision(name=natural, asked=asked, reason=why)
    if fault_of(begun, on_gpu=device.type != "cpu"):
        return Precision(name=natural, asked=asked, reason=f"{why}, where the run cannot go on in {begun} as it began")
    return Precision(name=begun, asked=asked, reason=f"as the run began; a new one would take {natural} here ({why})")


def _natural(device: torch.device) -> tuple[str, str]:
    """What a new run takes on this device, and why."""
    if device.type != "cpu":
        return possible_precisions("auto", on_gpu=True)[0], "a GPU multiplies bf16"
    return cpu_precision(cpu_flags(), torch.backends.cpu.get_cpu_capability(), os.environ)


def cpu_precision(flags: frozenset[str], capability: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """What a new run takes on a CPU with these flags, and why, where torch's kernels use `capability` (which
    ATEN_CPU_CAPABILITY lowers) and `environment` may limit oneDNN's."""
    found = [flag for flag in BF16_FLAGS if flag in flags]
    if not found:
        return "fp32", "this CPU does not multiply bf16 (neither avx512_bf16 nor amx_bf16)"
    limit = environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or ""
    if limit.lower() in LIMITS_WITHOUT_BF16:
        return "fp32", f"this CPU may not multiply bf16 (ONEDNN_MAX_CPU_ISA is {limit})"
    if not capability.startswith("AVX512"):
        return "fp32", f"this CPU may not multiply bf16 (torch's capability is {capability})"
    return "bf16", f"this CPU multiplies bf16 ({found[-1]})"

"""Section `runtime`: device, precision and process limits."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.config.errors import InputError
from megatron_ext.config.section import Count, Number, Section

DeviceName = Literal["auto", "cpu", "cuda"]
"""What a program's `device` option may be."""

FP8_MULTIPLES = {"tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""FP8 recipe -> what both sides of a matrix product must be multiples of (Transformer Engine, pytorch/utils.py
assert_dim_for_fp8_exec and the quantizers' is_quantizable)."""

FP8_NEEDS_A_GPU = (
    "runtime.precision is fp8, which needs a GPU with Transformer Engine: on a CPU set it to auto, bf16 or fp32"
)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(Section, section="runtime"):
    """Device, precision and process limits."""

    device: DeviceName = "auto"
    """Where to compute; auto takes CUDA when a GPU is visible (NCCL), else the CPU (gloo)."""

    precision: Literal["auto", "fp32", "bf16", "fp8"] = "fp32"
    """Type of weights and activations; bf16 keeps fp32 master weights in the optimizer, fp8 is bf16 with the layers'
    matrix products in 8 bits (GPU with Transformer Engine); auto is what the run began with, for a new run bf16 on a
    GPU and on a CPU that multiplies it, else fp32."""

    fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How precision fp8 scales: one current scale per tensor (Hopper and later), one per block of 128 x 128 (Hopper),
    or one per 32 values (Blackwell)."""

    deterministic: bool = False
    """Ask every library for bitwise repeatable kernels, and fail where there is none. A CPU is repeatable anyway."""

    num_threads: Number = 0
    """CPU threads per rank; 0 shares the machine's cores evenly among its ranks."""

    distributed_timeout_s: Count = 600
    """Seconds after which a collective that does not finish ends the job."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision == "fp8" and self.device == "cpu":
            raise InputError(FP8_NEEDS_A_GPU)

    @property
    def names_gpu(self) -> bool:
        """Whether the device is a GPU on any machine."""
        return self.device == "cuda"

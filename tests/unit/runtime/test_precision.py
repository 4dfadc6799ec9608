"""What precision auto becomes: by the CPU, by what limits its kernels, by what the run began with."""

import pytest
import torch

from megatron_ext.runtime.hardware import cpu_flags
from megatron_ext.runtime.precision import SLOWER, cpu_precision, settle_precision

NEW = frozenset({"avx2", "avx512f", "avx512_bf16"})
OLD = frozenset({"avx2", "f16c", "fma"})
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "capability", "environment", "name", "reason"),
    [
        (NEW, "AVX512", {}, "bf16", "this CPU multiplies bf16 (avx512_bf16)"),
        (NEW | {"amx_bf16", "amx_tile"}, "AVX512", {}, "bf16", "(amx_bf16)"),
        (OLD, "AVX2", {}, "fp32", "neither avx512_bf16 nor amx_bf16"),
        (OLD | {"avx512f", "avx512_vnni"}, "AVX512", {}, "fp32", "neither"),
        (frozenset(), "DEFAULT", {}, "fp32", "neither"),
        (NEW, "AVX2", {}, "fp32", "torch's capability is AVX2"),
        (NEW, "DEFAULT", {}, "fp32", "torch's capability is DEFAULT"),
        (NEW, "AVX512", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "fp32", "ONEDNN_MAX_CPU_ISA is AVX2"),
        (NEW, "AVX512", {"ONEDNN_MAX_CPU_ISA": "avx512_core_vnni"}, "fp32", "ONEDNN_MAX_CPU_ISA is avx512_core_vnni"),
        (NEW, "AVX512", {"DNNL_MAX_CPU_ISA": "SSE41"}, "fp32", "SSE41"),
        (NEW, "AVX512", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "bf16", "avx512_bf16"),
        (NEW, "AVX512", {"ONEDNN_MAX_CPU_ISA": "ALL"}, "bf16", "avx512_bf16"),
    ],
)
def test_a_new_run_on_a_cpu(flags, capability, environment, name, reason):
    found, why = cpu_precision(flags, capability, environment)
    assert found == name and reason in why


def test_the_flags_are_read():
    assert cpu_flags() & {"fpu", "avx2", "asimd"} or not cpu_flags(), (
        "of the first processor; none where none are named"
    )


@pytest.fixture
def no_bf16(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")


def test_without_bf16(no_bf16):
    assert settle_precision("auto", CPU).name == "fp32"
    assert settle_precision("auto", torch.device("cuda")).name == "bf16"
    assert settle_precision("fp32", CPU).line == "computing in fp32: as configured"
    by_name = settle_precision("bf16", CPU)
    assert (by_name.name, by_name.asked) == ("bf16", "bf16")
    assert f"a step takes {SLOWER} times as long as in fp32" in by_name.line and "\n" not in by_name.line
    assert "times as long" not in settle_precision("bf16", torch.device("cuda")).line


def test_a_run_keeps_what_it_began_in(no_bf16):
    kept = settle_precision("auto", CPU, begun_in=lambda: "bf16")
    assert (kept.name, kept.asked) == ("bf16", "auto")
    assert kept.line.startswith("computing in bf16: as the run began; a new one would take fp32 here (this CPU ")
    assert settle_precision("auto", CPU, begun_in=lambda: "fp32").line == settle_precision("auto", CPU).line
    assert settle_precision("fp32", CPU, begun_in=lambda: pytest.fail("it is named")).name == "fp32"


def test_a_device_that_cannot_go_on_in_it(no_bf16):
    gpu = torch.device("cuda")
    on_gpu = settle_precision("auto", gpu, begun_in=lambda: "fp32")
    assert on_gpu.name == "bf16" and "cannot go on in fp32 as it began" in on_gpu.line
    assert settle_precision("auto", CPU, begun_in=lambda: "fp8").name == "fp32"
    anything = settle_precision("auto", gpu, begun_in=lambda: "fp32", fault_of=lambda name, on_gpu: None)
    assert anything.name == "fp32", "networks with fp32 weights go on in fp32 on a GPU, too"

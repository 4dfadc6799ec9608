"""What a program imports before it does anything."""

import subprocess
import sys

import pytest
import torch

from megatron_ext.runtime.cpu import check_version


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there megatron-core's fusions are compiled")
def test_no_compiler_is_imported_on_a_cpu():
    """It would take longer than everything else that a program imports."""
    program = (
        "import sys, megatron_ext.train, megatron.core.jit as jit; print(jit.jit_fuser.__name__); "
        "print([name for name in sys.modules if name.startswith('torch._inductor')])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    fuser, compiler = result.stdout.splitlines()
    assert fuser == "noop_decorator"
    if check_version().startswith("0.16."):  # 0.19 names torch.compile outside of its fusions, too
        assert compiler == "[]"

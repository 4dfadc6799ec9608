"""What a program imports before it does anything."""

import subprocess
import sys

import pytest
import torch


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there megatron-core's fusions are compiled")
def test_no_compiler_is_imported_on_a_cpu():
    """It would take longer than everything else that a program imports."""
    program = (
        "import sys, megatron_ext.train; print([name for name in sys.modules if name.startswith('torch._inductor')])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"

"""The upstream bug that checkpoint/decoder.py repairs is still there; the repair may go when this fails."""

import subprocess
import sys

from tests.architecture.source import ROOT


def test_the_reproducer_of_the_shared_adam_step():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "upstream" / "adam_step.py")], capture_output=True, text=True
    )
    found = [line.split("Adam steps ")[1] for line in done.stdout.splitlines() if "Adam steps" in line]
    assert found == ["[6.0, 6.0, 6.0], loss 1.029552", "[12.0, 12.0, 12.0], loss 1.123420"], done.stderr
    assert done.returncode == 1

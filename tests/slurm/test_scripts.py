"""What can be said of the shell scripts without running them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [path for folder in ("slurm", ".ci") for path in sorted((ROOT / folder).iterdir()) if path.suffix != ".py"]


def test_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here: install it (Debian: apt-get install shellcheck)")
    result = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_what_an_allocation_left_is_not_handed_on(tmp_path):
    """Inside a salloc: the job has sizes, memory and array of its own."""
    left = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "3", "SLURM_MEM_PER_NODE": "9", "SLURM_ARRAY_TASK_ID": "2"}
    script = tmp_path / "typed.sbatch"
    script.write_text(". slurm/job.sh\n! in_queue && env\n")
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "SLURM_CONF": "/etc/x.conf", **left}
    result = subprocess.run(["bash", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("SLURM")] == ["SLURM_CONF=/etc/x.conf"]


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.suffix == ".sbatch"], ids=lambda path: path.name)
def test_every_script_says_when_it_is_not_in_the_project(script, tmp_path):
    copy = shutil.copy(script, tmp_path / "slurm_script")
    result = subprocess.run(
        ["bash", copy], env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (
        result.returncode == 2
        and result.stderr == f"error: {tmp_path} is not the project's folder: submit from there\n"
    )

"""Open files: the soft limit is no limit, the hard one is told in one line."""

import subprocess
import sys

SCRIPT = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 60))
from megatron_ext.config import run_program
from megatron_ext.files import check_open_files

def main(argv):
    held = []
    while True:
        check_open_files(3, f"dataset {len(held) // 3}")
        held += [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]

run_program(main)
"""


def test_the_hard_limit_is_told_and_the_soft_one_raised():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    # 57 and the three standard streams, less what the interpreter itself has open.
    line, number = result.stderr, int(result.stderr.split()[2].rstrip(":"))
    assert line.startswith(f"error: dataset {number}: Too many open files, and this process may have 60: ")
    assert "ulimit -n" in line and 15 <= number <= 19

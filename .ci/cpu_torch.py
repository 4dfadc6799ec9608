"""Whether torch is a CPU build: the one in pip's report on standard input (pip install --report), or the installed one
where the report has none. Ends with 0 if it is, with 69 if it needs CUDA's libraries."""

import json
import re
import runpy
import sys
import sysconfig
from pathlib import Path

OF_CUDA = re.compile(r"(nvidia|cuda)[-_]")
"""What the names of CUDA's libraries on the index begin with."""


def is_cpu_build(report: dict) -> bool:
    """Of the one package in the report, by what it needs; of the installed torch, by what it says of itself."""
    for package in report["install"]:
        return not any(OF_CUDA.match(need) for need in package["metadata"].get("requires_dist", ()))
    installed = Path(sysconfig.get_path("purelib"), "torch", "version.py")
    return not runpy.run_path(str(installed))["cuda"]


if __name__ == "__main__":
    sys.exit(0 if is_cpu_build(json.load(sys.stdin)) else 69)

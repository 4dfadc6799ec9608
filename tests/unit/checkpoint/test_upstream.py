"""What checkpoint/repairs.py repairs is still broken upstream; a repair may go when its reproducer ends well here."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from megatron_ext.checkpoint.repairs import REPAIRS
from tests.architecture.source import ROOT

FOUND = {
    "adam_step": ["Adam steps [6.0, 6.0, 6.0], loss 1.029552", "Adam steps [12.0, 12.0, 12.0], loss 1.123420"],
    "padded_buckets": ["[[1.0], [2.0], [3.0], [4.0]]", "[[0.0, 1.0], [1.0, 2.0], [2.0, 3.0], [4.0]]"],
    "group_keys": (
        ["lr: 0.1 instead of 0.2", "min_lr: 0.0 instead of 0.01", "adam_eps: 1e-08 instead of 0.001"]
        if version("megatron-core").startswith("0.16.")
        else ["lr: no group found", "min_lr: no group found", "adam_eps: 1e-08 instead of 0.001"]
    ),
}
"""Reproducer -> what its lines end with."""

RUN = """
import contextlib, importlib, io, json, sys
found = {}
for name in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as lines:
        try:
            importlib.import_module(name).main()
        except SystemExit as ended:
            found[name] = bool(ended.code), lines.getvalue().splitlines()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[bool, list[str]]]:
    """Reproducer -> whether it found its fault, and its lines; all in one process, whose imports cost most."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *FOUND], cwd=ROOT / "docs" / "upstream", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("reproducer", FOUND)
def test_the_reproducer_still_finds_it(reproducer, found):
    is_broken, lines = found[reproducer]
    assert is_broken, "upstream is repaired: let the repair go"
    for line, expected in zip(lines, FOUND[reproducer], strict=True):
        assert line.endswith(expected)


def test_every_repair_is_written_up():
    table = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    for repair in REPAIRS:
        assert f"`{repair.function.__name__}`" in table and repair.fix.removeprefix("docs/") in table
        assert (ROOT / repair.test.split("::")[0]).is_file()
    for name in FOUND:
        assert f"upstream/{name}.py" in (ROOT / "docs" / f"upstream_{name}.md").read_text(encoding="utf-8")
    assert len(FOUND) == len(REPAIRS)

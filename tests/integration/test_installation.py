"""`pip install .` gives the programs: the wheel of this tree, unpacked elsewhere, run by its console scripts."""

import os
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_ext.plan.question import Question
from tests.architecture.source import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the wheel's content: what pip would put into site-packages."""
    folder = tmp_path_factory.mktemp("installation")
    # Built from a copy: setuptools leaves build/ and *.egg-info where it works.
    tracked = [
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "-z",
        "--",
        "*.py",
        "*.cpp",
        "*.toml",
        "*.jinja",
    ]
    names = subprocess.run(["git", *tracked], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in [name for name in names if name and not name.startswith("tests/")] + ["README.md", "LICENSE"]:
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(folder / "source")], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def console_scripts(site: Path) -> dict[str, str]:
    (path,) = site.glob("*.dist-info/entry_points.txt")
    lines = path.read_text().split("[console_scripts]")[1].strip().splitlines()
    return dict(line.split(" = ") for line in lines)


HELP_OF_ALL = """
import importlib, sys
for script in sys.argv[1:]:
    name, module, function = script.split(":")
    sys.argv = [name, "--help"]
    print("PROGRAM", name, flush=True)
    try:
        getattr(importlib.import_module(module), function)()
    except SystemExit as end:
        assert not end.code, (name, end.code)
"""


def test_console_scripts_answer(installed, tmp_path):
    """Each program's --help names its options; run outside the tree, so that only the wheel can be found."""
    scripts = console_scripts(installed)
    assert scripts == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", HELP_OF_ALL, *(f"{name}:{target}" for name, target in scripts.items())]
    # One process for all: importing torch for each would take most of a minute.
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    answers = dict(answer.split("\n", 1) for answer in done.stdout.split("PROGRAM ")[1:])
    assert answers.keys() == scripts.keys()
    assert all("--help" in answer for answer in answers.values())
    # Options that are taken from the command line before the configuration is read.
    other = {"emu3-pretrain": [field.name for field in fields(Question)], "emu3-preprocess-data": ["plan --help"]}
    for name, options in other.items():
        assert all(f"--{option}" in " ".join(answers[name].split()) for option in options), name


def test_the_extensions_and_the_template_are_in_the_wheel(installed):
    assert all(list(installed.glob(f"megatron_ext/data/{name}*.so")) for name in ("_clusters", "_packing"))
    assert (installed / "megatron_ext/observe/report.html.jinja").exists()
    assert not (installed / "tests").exists() and not (installed / "tools").exists()


@pytest.mark.parametrize(("accelerator", "lock"), [("cuda", "constraints-cuda.txt"), ("cpu", "constraints-cpu.txt")])
def test_the_environment_asked_for_is_made_on_any_machine(accelerator, lock, tmp_path):
    """As on a login node, which has no GPU. Its pip ends at once: what matters is what it is asked for."""
    pip = tmp_path / "bin" / "pip"
    pip.parent.mkdir()
    pip.write_text('#!/bin/sh\necho "$@"\nexit 3\n')
    pip.chmod(0o755)
    command = [str(ROOT / ".ci" / "install"), sys.executable, str(tmp_path), accelerator]
    done = subprocess.run(command, capture_output=True, text=True)
    torch = next(line for line in (ROOT / lock).read_text().splitlines() if line.startswith("torch=="))
    assert done.returncode == 3 and done.stdout.splitlines()[-1].endswith(f"install --no-deps {torch}")


def test_another_accelerator_is_refused(tmp_path):
    command = [str(ROOT / ".ci" / "install"), sys.executable, str(tmp_path), "tpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: ACCELERATOR is 'tpu': give cpu, cuda or auto\n"
    assert not list(tmp_path.iterdir())

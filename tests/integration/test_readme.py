"""The README's commands are true: every program it names accepts the options it shows."""

import importlib
import re
import shlex

import pytest

from tests.architecture.source import ROOT


def commands() -> list[list[str]]:
    """The indented python and torchrun lines, continued lines joined."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [shlex.split(line) for line in lines if line.startswith(("python ", "torchrun "))]


@pytest.mark.parametrize(
    "command", commands(), ids=lambda command: next(part for part in command if part.endswith(".py"))
)
def test_commands_parse(command, capsys):
    position = next(index for index, part in enumerate(command) if part.endswith(".py"))
    program = importlib.import_module(command[position].removesuffix(".py").replace("/", "."))
    with pytest.raises(SystemExit) as end:
        program.main([*command[position + 1 :], "--print_config"])
    assert end.value.code in (0, None)
    assert capsys.readouterr().out


def test_make_targets_exist():
    readme, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    targets = set(re.findall(r"^    make (\w+)", readme, flags=re.MULTILINE))
    assert targets and all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_files_it_names_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:examples|docs|tools)/[\w/.]+|[A-Z]+(?:\.md)?)`", text)
    assert names and all((ROOT / name).exists() for name in names)

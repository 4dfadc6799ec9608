"""The commands of README and answers are true: every program they name accepts the options they show."""

import importlib
import re
import shlex

import pytest

from tests.architecture.source import ROOT

DOCUMENTS = ("README.md", "docs/answers.md", "docs/conversion.md", "docs/preprocessing.md")


def commands() -> list[list[str]]:
    """The indented python and torchrun lines, continued lines joined."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [shlex.split(line) for line in lines if line.startswith(("python ", "torchrun "))]


def program_and_arguments(command: list[str]) -> tuple[str, list[str]]:
    """`python x/y.py ARGUMENTS` and `python -m x.y ARGUMENTS` as the module's name and its arguments."""
    if "-m" in command:
        position = command.index("-m") + 1
        return command[position], command[position + 1 :]
    position = next(index for index, part in enumerate(command) if part.endswith(".py"))
    return command[position].removesuffix(".py").replace("/", "."), command[position + 1 :]


@pytest.mark.parametrize("command", commands(), ids=lambda command: program_and_arguments(command)[0])
def test_commands_parse(command, capsys):
    module, arguments = program_and_arguments(command)
    program = importlib.import_module(module)
    with pytest.raises(SystemExit) as end:
        program.main([*arguments, "--print_config"])
    assert end.value.code in (0, None)
    assert capsys.readouterr().out


def test_make_targets_exist():
    readme, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    targets = set(re.findall(r"^    make (\w+)", readme, flags=re.MULTILINE))
    assert targets and all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_it_names_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    names = re.findall(r"`((?:examples|docs|tools|tests)/[\w/.]+|[A-Z]+(?:\.md)?)`", text)
    linked = [f"docs/{name}" for name in re.findall(r"\]\((\w+\.md)\)", text)]
    assert names and all((ROOT / name).exists() for name in names + linked)

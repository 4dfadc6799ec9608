"""Configuration: every field is explained and read, every shipped file loads."""

import ast
import dataclasses
import importlib
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ext.config.run import RunConfig
from tests.architecture.source import ROOT, name_of, product_files, room_of, syntax


def sections(config_type: type = RunConfig) -> Iterator[type]:
    """RunConfig and every dataclass below it."""
    yield config_type
    for hint in typing.get_type_hints(config_type).values():
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                yield from sections(inner)


def option_classes() -> list[tuple[Path, ast.ClassDef]]:
    """Every dataclass of configuration: `...Config`, wherever it stands."""
    found = []
    for path in product_files():
        for node in syntax(path).body:
            decorators = " ".join(ast.unparse(item) for item in getattr(node, "decorator_list", []))
            if "dataclass" in decorators and node.name.endswith("Config"):
                found.append((path, node))
    return found


def fields(node: ast.ClassDef) -> dict[str, str | None]:
    """Field name -> the sentence under it."""
    found: dict[str, str | None] = {}
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign):
            explained = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            found[statement.target.id] = following.value.value if explained else None
    return found


def names_read() -> set[str]:
    """Attributes that code outside config/ loads, and names it spells as strings (for tables of overrides)."""
    read = set()
    for path in product_files():
        if room_of(path) == "config":
            continue
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)
    return read


OPTION_CLASSES = option_classes()


@pytest.mark.parametrize(("path", "node"), OPTION_CLASSES, ids=lambda item: getattr(item, "name", None))
def test_every_field_is_explained_and_read(path, node):
    unexplained = [name for name, sentence in fields(node).items() if not (sentence or "").rstrip().endswith(".")]
    assert not unexplained, f"{name_of(path)} {node.name}: no sentence under {unexplained}"
    unread = sorted(fields(node).keys() - names_read())
    assert not unread, f"{name_of(path)} {node.name}: nobody reads {unread}"


def test_sections_are_frozen():
    for section in sections():
        assert section.__dataclass_params__.frozen, section.__name__
        assert all(field.kw_only for field in dataclasses.fields(section)), section.__name__


def program_of(example: Path) -> str:
    """The module that a configuration's opening comment says it is for: `python tools/x.py --config THE_FILE`, or one
    that follows other files, `--config FIRST --config THE_FILE`."""
    opening = "".join(re.findall(r"\A(?:#.*\n)+", example.read_text(encoding="utf-8")))
    program = r"(?:-m ([\w.]+)|([\w/]+)\.py)(?: --config \S+)*?"
    match = re.search(program + " --config " + re.escape(name_of(example)) + r"\b", opening)
    assert match, f"{name_of(example)} must open with a comment that holds the command that uses it"
    return match[1] or match[2].replace("/", ".")


EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_every_shipped_configuration_loads(example, capsys):
    program = importlib.import_module(program_of(example))
    with pytest.raises(SystemExit) as end:
        program.main(["--config", str(example), "--print_config"])
    assert end.value.code in (0, None)
    assert capsys.readouterr().out


def test_there_are_shipped_configurations():
    assert EXAMPLES

"""The product's own Python files and their syntax trees."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("megatron_ext", "tokenizer_train", "tools", "examples")


@functools.cache
def product_files() -> tuple[Path, ...]:
    """Every Python file that is shipped: tests and benchmarks are not."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return (*files, ROOT / "pretrain_emu3.py", ROOT / "setup.py")


@functools.cache
def files_of_tests() -> tuple[Path, ...]:
    """Every Python file of the tests."""
    return tuple(sorted((ROOT / "tests").rglob("*.py")))


@functools.cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name_of(path: Path) -> str:
    """The path as an error should show it."""
    return str(path.relative_to(ROOT))


def room_of(path: Path) -> str:
    """`vocab` for megatron_ext/vocab/layout.py; the top folder or module for what is not in megatron_ext."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "megatron_ext" and len(parts) > 2 else parts[0]


def imported_modules(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names of all modules the file imports, inside functions too, with their lines."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module, node.lineno
            # `from megatron_ext import vocab` imports a room by its name.
            if module == "megatron_ext":
                for alias in node.names:
                    yield f"{module}.{alias.name}", node.lineno

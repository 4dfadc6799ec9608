"""The import graph of docs/architecture.md; `python -m tests.architecture.import_graph` rewrites it."""

import re
from collections.abc import Iterable

from tests.architecture.source import ROOT
from tests.architecture.test_imports import LEVEL_OF, OUTSIDE, edges

DOCUMENT = ROOT / "docs" / "architecture.md"
BLOCK = re.compile(r"(?<=<!-- import graph -->\n```\n).*?(?=```\n)", re.DOTALL)


def as_text() -> str:
    """One line per room and the rooms that its files import; all import config, programs nearly everything."""
    imports: dict[str, set[str]] = {}
    for importing, imported, _ in edges():
        if importing not in OUTSIDE and imported != "config":
            imports.setdefault(importing, set()).add(imported)
    width = max(map(len, imports))
    return "".join(f"{room:<{width}}  {' '.join(in_order(imports[room]))}\n" for room in in_order(imports))


def in_order(rooms: Iterable[str]) -> list[str]:
    return sorted(rooms, key=lambda room: (LEVEL_OF[room], room))


if __name__ == "__main__":
    DOCUMENT.write_text(BLOCK.sub(as_text(), DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")

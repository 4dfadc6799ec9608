"""docs/architecture.md shows the imports that the code has."""

from tests.architecture.import_graph import BLOCK, DOCUMENT, as_text


def test_the_documented_import_graph_is_the_code_s():
    (shown,) = BLOCK.findall(DOCUMENT.read_text(encoding="utf-8"))
    assert shown == as_text(), "python -m tests.architecture.import_graph rewrites it"

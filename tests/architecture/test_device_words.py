"""Only runtime/ knows what a device or a communication backend is called."""

import ast
import re

from tests.architecture.source import ROOT, name_of, product_files, syntax

WORDS = re.compile(r"\b(cuda|nccl|gloo|parallel_state)\b")
ROOM = ROOT / "megatron_ext" / "runtime"
SECTION = ROOT / "megatron_ext" / "config" / "runtime.py"  # the room's own section: its choices are spelt there


def docstrings(tree: ast.Module) -> set[int]:
    """Ids of the string constants that stand alone as statements: docstrings and the sentences under fields."""
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    return {id(node.value) for node in statements if isinstance(node.value, ast.Constant)}


def words_in(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, word) for every device word in a name, an attribute, an import or a string that is no prose."""
    documentation = docstrings(tree)
    found = []
    for node in ast.walk(tree):
        texts = []
        if isinstance(node, ast.Name):
            texts = [node.id]
        elif isinstance(node, ast.Attribute):
            texts = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            texts = [node.value] if not re.search(r"\s", node.value) else []  # a sentence is for the user
        elif isinstance(node, ast.Import | ast.ImportFrom):
            texts = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        found += [(node.lineno, match[0]) for text in texts for match in WORDS.finditer(text)]
    return found


def test_device_words_stay_in_runtime():
    wrong = [
        f"{name_of(path)}:{line}: {word}"
        for path in product_files()
        if ROOM not in path.parents and path != SECTION
        for line, word in words_in(syntax(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_search_finds_what_it_should():
    lines = ('"""cuda in prose"""', "import torch.cuda", "x.cuda()", 'y = "nccl"', 'f("no cuda")', "from a import gloo")
    assert sorted(words_in(ast.parse("\n".join(lines)))) == [(2, "cuda"), (3, "cuda"), (4, "nccl"), (6, "gloo")]

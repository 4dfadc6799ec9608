"""The hunt on a tree of two files: what is caught, what survives, what is refused, and nothing left changed."""

import pytest

from tests.mutants.__main__ import BrokenMutant, hunt, run_tests
from tests.mutants.records import Mutant

CODE = "def larger(a, b):\n    return a if a > b else b\n"
TESTS = "from code_under_test import larger\n\n\ndef test_larger():\n    assert larger(1, 2) == 2\n"


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "code_under_test.py").write_text(CODE)
    (tmp_path / "test_larger.py").write_text(TESTS)
    return tmp_path


def mutant(old: str, new: str) -> Mutant:
    return Mutant(name=new, resembles="", file="code_under_test.py", old=old, new=new, tests=("test_larger.py",))


def test_caught_and_survived(tree, capsys, monkeypatch):
    """Whatever options the tests around these were started with."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    caught, survivor = mutant("a > b", "a < b"), mutant("a > b", "a >= b")
    assert hunt([caught, survivor], tree) == [survivor]
    first, second = capsys.readouterr().out.splitlines()
    assert "caught by test_larger.py::test_larger" in first and "SURVIVED" in second
    assert (tree / "code_under_test.py").read_text() == CODE


@pytest.mark.parametrize("old", ["a == b", "a"])
def test_text_that_is_not_there_once_is_refused(tree, old):
    with pytest.raises(BrokenMutant, match="it must stand once"):
        hunt([mutant(old, "x")], tree)


def test_a_selection_that_names_nothing_is_refused(tree):
    with pytest.raises(BrokenMutant, match="ended with 4"):
        run_tests(tree, ["test_larger.py::test_smaller"])


def test_a_program_that_cannot_be_imported_is_not_called_caught(tree):
    with pytest.raises(BrokenMutant, match="ended with"):
        hunt([mutant("return a", "return return a")], tree)


def test_a_program_that_cannot_be_set_up_is_not_called_caught(tree):
    (tree / "conftest.py").write_text("import pytest\nfrom code_under_test import larger\n\n"
                                      "@pytest.fixture(autouse=True)\ndef two():\n    larger(1, 2)\n")  # fmt: skip
    with pytest.raises(BrokenMutant, match="1 error"):
        hunt([mutant("a > b", "a > c")], tree)

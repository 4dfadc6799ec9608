"""Mutants do not rot: each can still be planted, and the tests that must catch it exist."""

import ast

import pytest

from tests.mutants.__main__ import ROOT, planted
from tests.mutants.records import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_planted(mutant):
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    changed = planted(mutant, text)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text)), "the program must be another one"


@pytest.mark.parametrize("test", sorted({test for mutant in MUTANTS for test in mutant.tests}))
def test_the_selected_tests_exist(test):
    """Files and functions; `make mutants` refuses a parameter that is not there."""
    file, _, function = test.partition("::")
    names = {node.name for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body if hasattr(node, "name")}
    assert function.split("[")[0] in names if function else any(name.startswith("test_") for name in names)


def test_names_are_distinct():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)

"""Mutants do not rot: each can still be planted, and the tests that must catch it exist."""

import ast
import os
import subprocess
import sys

import pytest

from tests.mutants.__main__ import ROOT, planted, without_pytest
from tests.mutants.records import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_planted(mutant):
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    changed = planted(mutant, text)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text)), "the program must be another one"


def test_the_selected_tests_exist():
    """Parameters too: pytest itself must find each."""
    tests = sorted({test for mutant in MUTANTS for test in mutant.tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "--disable-warnings", *tests]
    environment = without_pytest(os.environ)
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_names_are_distinct():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)

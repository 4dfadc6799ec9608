"""Under CI nothing is skipped; which tests run beside which; what tests of several folders share."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

# Before torch is imported: ranks and programs would otherwise fight for the cores, and sums have another order.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.support.distributed import Ranks

settings.register_profile("without a clock", deadline=None)  # the first example of a test may import half of torch
settings.load_profile("without a clock")

UNDER_CI = os.environ.get("CI", "") not in ("", "0", "false")


def _skip_is_failure(report: pytest.TestReport | pytest.CollectReport) -> None:
    if UNDER_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    _skip_is_failure(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _skip_is_failure(report)
    return report


FIRST = ("distributed", "integration", "parity", "tokenizer_vision", "vision", "curate")
"""Folders whose files take longest: two workers that begin with them end together."""


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the mark in this hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under pytest-xdist, a file stays together, for its fixtures' sake, and all that use ranks are one group: those
    processes are started once."""
    with_ranks = {item.path for item in items if "ranks" in item.fixturenames}
    for item in items:
        group = "ranks" if item.path in with_ranks else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))

    def place(item: pytest.Item) -> tuple[bool, int]:
        folders = [FIRST.index(part) for part in item.path.parts if part in FIRST]
        return item.path not in with_ranks, min(folders, default=len(FIRST))

    items.sort(key=place)


@pytest.fixture(scope="session")
def ranks() -> "Iterator[Ranks]":
    """Up to four ranks, started when the first test needs them."""
    from tests.support.distributed import Ranks

    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, see tests/support/browser.py."""
    from tests.support.browser import Browser

    browser = Browser()
    yield browser
    browser.close()

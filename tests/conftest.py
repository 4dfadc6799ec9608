"""Under CI nothing is skipped: a tool or library that is missing there is a failure."""

import os

import pytest
from hypothesis import settings

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


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, see tests/support/browser.py."""
    from tests.support.browser import Browser

    browser = Browser()
    yield browser
    browser.close()

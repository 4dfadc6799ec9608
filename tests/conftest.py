"""Under CI nothing is skipped; which tests run beside which; what tests of several folders share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.support.distributed import Ranks

# What the tests inherit and a program would obey: an allocation that they were started in, the ranks of another
# torchrun, how a terminal shows text.
FOREIGN = ("COLUMNS", "EMU3_", "FORCE_COLOR", "LOCAL_", "MASTER_", "RANK", "SBATCH_", "SLURM_", "TORCHELASTIC_",
           "TTY_COMPATIBLE", "WANDB_", "WORLD_SIZE")  # fmt: skip


def pytest_configure() -> None:
    """Wherever the tests are started, they and the programs that they start meet the same."""
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        del os.environ[name]
    # Ranks and programs would otherwise fight for the cores, and sums have another order.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Ignored in jobs in the background and under many CI runners.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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


HERE = Path(__file__).parent
FIRST = ("distributed", "integration", "parity", "tokenizer_vision", "vision", "curate")
"""Folders whose files take longest: two workers that begin with them end together."""


SLOW = {"distributed", "integration", "mutants", "parity"}
"""Folders that `make test-fast` leaves out; elsewhere the tests say it themselves."""


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their argument. Both workers must find the same names, and what is compressed or encoded while
    a module is imported holds the time, or a number drawn."""
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(tryfirst=True)  # pytest-xdist, and the choice by marks, read them in this hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under pytest-xdist, a file stays together, for its fixtures' sake, and all that use ranks are one group: those
    processes are started once. What has a group of its own keeps it."""
    with_ranks = {item.path for item in items if "ranks" in item.fixturenames}
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            group = "ranks" if item.path in with_ranks else item.nodeid.partition("::")[0]
            item.add_marker(pytest.mark.xdist_group(group))
        if "ranks" in item.fixturenames or SLOW & {*item.path.relative_to(HERE).parts}:
            item.add_marker(pytest.mark.slow)

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

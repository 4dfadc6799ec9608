"""The processes that the tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.support.distributed import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Up to four ranks, started once: each costs seconds of imports."""
    ranks = Ranks()
    yield ranks
    ranks.close()

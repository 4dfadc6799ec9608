"""Everything in this folder needs a GPU: `make test-gpu` runs it. One topology serves the tests that look inside."""

from pathlib import Path

import pytest

from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.runtime import Topology

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="module")
def topology():
    """This process as the only rank, in bf16, on the first GPU."""
    with Topology.start(RuntimeConfig(device="cuda", precision="bf16"), ParallelConfig()) as topology:
        yield topology

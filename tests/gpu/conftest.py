"""One GPU topology for the tests that look inside the decoder."""

import pytest

from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.runtime import Topology


@pytest.fixture(scope="module")
def topology():
    """This process as the only rank, in bf16, on the first GPU."""
    with Topology.start(RuntimeConfig(device="cuda", precision="bf16"), ParallelConfig()) as topology:
        yield topology

"""Rank 0 settles the precision for all."""

import os

from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from tests.support.distributed import use_next_store


def settle() -> tuple[str, str]:
    """Each rank's own sight says something else."""
    from megatron_ext.runtime import Topology

    runtime = RuntimeConfig(device="cpu", precision="auto", num_threads=1)
    begun_in = {"0": "fp32", "1": "bf16"}[os.environ["RANK"]]
    with Topology.start(runtime, ParallelConfig(), begun_in=lambda: begun_in) as topology:
        found = topology.precision.name, str(topology.dtype)
    use_next_store()
    return found


def test_the_ranks_agree(ranks):
    assert ranks.run(settle, 2) == [("fp32", "torch.float32")] * 2

"""Randomness as a function of where it is used: nothing to save, and a resume on any layout is defined.

Two streams, as megatron-core has them: the default generator for activations that every tensor rank holds whole, and
the "model-parallel-rng" of its tracker for activations that are sharded over the tensor axis (attention heads; sequence
chunks under sequence parallelism).
"""

import hashlib

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_ext.runtime.topology import Topology

SHARDED_STREAM = "model-parallel-rng"


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from `parts`; any change of any part gives an unrelated seed."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_microbatch(seed: int, step: int, microbatch: int, topology: Topology) -> None:
    """Seed dropout for one microbatch of optimizer step `step` (0-based) on this rank."""
    place = (seed, step, microbatch, topology.data_parallel_rank, topology.context_parallel_rank)
    torch.manual_seed(derive_seed(*place, "replicated"))
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(SHARDED_STREAM, derive_seed(*place, "sharded", topology.tensor_parallel_rank))

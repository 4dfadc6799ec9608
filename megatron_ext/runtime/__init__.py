"""The machine: device, ranks, randomness. The only room that names CUDA, NCCL, gloo or parallel_state."""

from megatron_ext.runtime.rng import derive_seed, seed_microbatch
from megatron_ext.runtime.topology import Topology, check_layout

__all__ = ["Topology", "check_layout", "derive_seed", "seed_microbatch"]

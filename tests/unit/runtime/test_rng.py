"""Dropout's randomness: where two ranks, steps or microbatches must draw alike, and where never."""

import dataclasses

import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.runtime import Topology, seed_microbatch


@pytest.fixture(scope="module")
def topology():
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        yield topology


def draws(topology: Topology, *, seed: int = 1, step: int = 2, microbatch: int = 3, **ranks: int) -> tuple:
    """(replicated, sharded) numbers that a rank at this place draws."""
    seed_microbatch(seed, step, microbatch, dataclasses.replace(topology, **ranks))
    replicated = torch.rand(4)
    with get_cuda_rng_tracker().fork():
        sharded = torch.rand(4)
    return tuple(replicated.tolist()), tuple(sharded.tolist())


@pytest.mark.parametrize(
    "change",
    [{"seed": 7}, {"step": 7}, {"microbatch": 7}, {"data_parallel_rank": 7}, {"context_parallel_rank": 7}],
    ids=lambda change: next(iter(change)),
)
def test_both_streams_depend_on_every_part_of_the_place(topology, change):
    here, there = draws(topology), draws(topology, **change)
    assert len({*here, *there}) == 4


def test_tensor_ranks_share_the_replicated_stream_only(topology):
    here, there = draws(topology), draws(topology, tensor_parallel_rank=1)
    assert here[0] == there[0], "what every tensor rank holds whole must be dropped alike"
    assert here[1] != there[1], "shards are different activations"


def test_the_same_place_draws_the_same_numbers_again(topology):
    first = draws(topology)
    torch.rand(100)
    assert draws(topology) == first

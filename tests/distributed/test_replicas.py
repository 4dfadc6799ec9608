"""Replicas of the weights: one changed bit on one rank is found and named."""

import torch

from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.resilience.rank_times import line_about, rank_times
from megatron_ext.resilience.replicas import checksum, differing_replicas, unlike_masters
from megatron_ext.runtime import Topology
from tests.support.distributed import use_next_store
from tests.support.training import training

WHOLE = "decoder.final_layernorm.weight"


def flip_lowest_bit(weight: torch.Tensor, index: int) -> None:
    """As a fault of the memory would: the smallest change there is."""
    weight.data.view(-1).view(torch.int16)[index] ^= 1


def _look(folder: str, parallel: dict, faulty_rank: int, name: str) -> tuple[list[str], list[str], list[str]]:
    with training(folder, parallel, precision="bf16") as run:
        module = run.optimizer.model.module
        before = differing_replicas(module, run.topology) + unlike_masters(run.optimizer, run.topology)
        if run.topology.rank == faulty_rank:
            flip_lowest_bit(dict(module.named_parameters())[name], 3)
        return before, differing_replicas(module, run.topology), unlike_masters(run.optimizer, run.topology)


def test_a_flipped_bit_is_found(ranks, tmp_path) -> None:
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    for before, after, _ in ranks.run(_look, 3, str(tmp_path), {}, 2, name):
        assert before == [] and after == [f"rank 2: {name}"]


def test_weights_that_masters_do_not_round_to(ranks, tmp_path) -> None:
    ((before, _, masters),) = ranks.run(_look, 1, str(tmp_path), {}, 0, WHOLE)
    (found,) = masters
    assert before == [] and found.startswith("rank 0: master weights of a shard of ")


def test_tensor_ranks_share_the_norms(ranks, tmp_path) -> None:
    for before, after, _ in ranks.run(_look, 4, str(tmp_path), {"tensor_model_parallel_size": 2}, 1, WHOLE):
        # Rank 1's tensor pair is ranks 0 and 1, its data pair ranks 1 and 3: of two the lower rank is believed.
        assert before == [] and after == [f"rank 1: {WHOLE}", f"rank 3: {WHOLE}"]


def test_every_single_change_changes_the_sum() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(7, 5, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).to(dtype)
        before = checksum(weight)
        weight[6, 4] = -weight[6, 4]
        assert checksum(weight) != before


def _times(seconds: list[tuple[float, float]]) -> dict | None:
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        told = rank_times(*seconds[topology.rank], topology)
    use_next_store()
    return told


def test_the_slowest_rank_is_named(ranks) -> None:
    told, *others = ranks.run(_times, 3, [(0.01, 1.0), (0.5, 1.1), (0.011, 2.0)])
    assert others == [None, None]
    assert told["slowest_data_rank"] == 1 and told["slowest_compute_rank"] == 2
    line = "rank 1 takes 0.500 s for its data, 45.5 times the median; "
    assert line_about(told) == line + "rank 2 takes 2.000 s for its compute, 1.8 times the median"
    told, *_ = ranks.run(_times, 3, [(0.001, 1.0), (0.005, 1.1), (0.001, 1.0)])
    assert line_about(told) is None

"""Two ranks are one: batch norms, gradients and metrics of a divided batch against plain torch on the joined one."""

import pytest
import torch
from torch import nn

from tests.support.distributed import Ranks, use_next_store

TOLERANCE = dict(rtol=0, atol=2e-6)
"""Sums in another order; measured at most 4.8e-7 on values of order 1 (outputs), gradients and statistics less."""


@pytest.fixture(scope="module")
def ranks():
    started = Ranks()
    yield started
    started.close()


def joined_batch(kind: str) -> torch.Tensor:
    """Five samples far from zero mean: a sum of squares would lose them."""
    size = {"2d": (5, 4, 3, 6), "3d": (5, 4, 2, 3, 3)}[kind]
    return torch.randn(size, generator=torch.Generator().manual_seed(3)) * 0.5 + 30


def norm_of(kind: str, momentum: float | None) -> nn.Module:
    torch.manual_seed(5)
    norm = {"2d": nn.BatchNorm2d, "3d": nn.BatchNorm3d}[kind](4, momentum=momentum)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


NORM_CASES = [("2d", 0.1, True), ("3d", 0.1, True), ("3d", None, True), ("3d", 0.1, False)]


def norm_pass(network: nn.Module, batch: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two passes in one backward pass, as a discriminator has them; everything that could differ."""
    batch = batch.clone().requires_grad_()
    output = network(batch)
    ((output * weight).sum() + network(batch * 2).square().sum() / 7).backward()
    found = {"output": output.detach(), "input gradient": batch.grad}
    found |= {name: parameter.grad for name, parameter in network.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in network.named_buffers()}


def norms_on_a_rank() -> list[dict[str, torch.Tensor]]:
    """Rank 0 has two of the samples, rank 1 three; gradients of weights are summed, what is per sample gathered."""
    import torch.distributed as dist

    from megatron_ext.config.parallel import ParallelConfig
    from megatron_ext.config.runtime import RuntimeConfig
    from megatron_ext.runtime import Topology
    from tokenizer_train.vision.parallel import Replicas

    results = []
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        own = slice(0, 2) if topology.rank == 0 else slice(2, 5)
        for kind, momentum, training in NORM_CASES:
            network = nn.Sequential(norm_of(kind, momentum)).train(training)
            before = dict(network.state_dict(keep_vars=True))
            Replicas(topology).join_batch_norms(network)
            after = network.state_dict(keep_vars=True)
            assert list(before) == list(after) and all(after[name] is before[name] for name in before)
            assert isinstance(network[0], nn.BatchNorm2d if kind == "2d" else nn.BatchNorm3d)
            batch = joined_batch(kind)
            found = norm_pass(network, batch[own], torch.sin(batch * 9)[own])
            for name, parameter in network.named_parameters():
                dist.all_reduce(found[name])
                assert parameter.grad is found[name]
            results.append(found)
    use_next_store()
    return results


def test_batch_norm_is_that_of_the_joined_batch(ranks):
    found = ranks.run(norms_on_a_rank, 2)
    for case, (kind, momentum, training) in enumerate(NORM_CASES):
        batch = joined_batch(kind)
        network = nn.Sequential(norm_of(kind, momentum)).train(training).double()
        expected = norm_pass(network, batch.double(), torch.sin(batch * 9).double())
        for name, value in expected.items():
            if name in ("output", "input gradient"):
                mine = torch.cat([rank[case][name] for rank in found])
            else:
                mine = found[0][case][name]
                assert torch.equal(mine, found[1][case][name]), (name, "differs between ranks")
            print(kind, momentum, training, name, (mine.double() - value).abs().max().item(), value.abs().max().item())
            torch.testing.assert_close(mine.double(), value.double(), **TOLERANCE)

"""Two ranks are one: batch norms, gradients, losses and a resume, against plain torch on the joined batch and against
one rank. One group of ranks walks all cases.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_ext.config import load
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.runtime import Topology
from tests.support.distributed import Ranks, use_next_store
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig
from tokenizer_train.vision.data import TrainingMedia
from tokenizer_train.vision.optimizer import NetworkOptimizer
from tokenizer_train.vision.parallel import Replicas
from tokenizer_train.vision.step import TrainStep
from tokenizer_train.vision.trainer import initial_model

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples/movqgan_tiny_cpu.yaml"

TOLERANCE = dict(rtol=0, atol=1e-5)
"""Of batch norms in 32 against 64 bits; TODO measured."""


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """What each of two ranks found on its walk."""
    ranks = Ranks()
    try:
        yield ranks.run(walk, 2, tmp_path_factory.mktemp("ranks"))
    finally:
        ranks.close()


def walk(folder: Path) -> dict[str, object]:
    """All cases on one rank."""
    with Topology.start(RuntimeConfig(device="cpu", num_threads=1), ParallelConfig()) as topology:
        found = {
            "norms": norms_on_a_rank(topology),
            "branches": branches_on_a_rank(topology),
            "trainings": {name: training_on_a_rank(topology, name) for name in TRAININGS},
        }
    use_next_store()
    return found


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


def norms_on_a_rank(topology: Topology) -> list[dict[str, torch.Tensor]]:
    """Rank 0 has two of the samples, rank 1 three; gradients of weights are summed over the ranks."""
    results = []
    own = slice(0, 2) if topology.rank == 0 else slice(2, 5)
    for kind, momentum, training in NORM_CASES:
        network = nn.Sequential(norm_of(kind, momentum)).train(training)
        before = dict(network.state_dict(keep_vars=True))
        replicas = Replicas(topology)
        replicas.join_batch_norms(network)
        after = network.state_dict(keep_vars=True)
        assert list(before) == list(after) and all(after[name] is before[name] for name in before)
        assert isinstance(network[0], nn.BatchNorm2d if kind == "2d" else nn.BatchNorm3d)
        batch = joined_batch(kind)
        found = norm_pass(network, batch[own], torch.sin(batch * 9)[own])
        results.append(found | {name: replicas.total(found[name]) for name, _ in network.named_parameters()})
    return results


def test_batch_norm_is_that_of_the_joined_batch(walked):
    found = [rank["norms"] for rank in walked]
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


class Branches(nn.Module):
    """Two networks of which a pass uses one, as a discriminator of pictures and clips."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second, self.never = nn.Linear(3, 1), nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, which: str, batch: torch.Tensor) -> torch.Tensor:
        return getattr(self, which)(batch).square().mean()


BATCH = torch.randn(4, 3, generator=torch.Generator().manual_seed(6))


def branches_on_a_rank(topology: Topology) -> dict[str, torch.Tensor | None]:
    """Gradients after two micro-batches, each through another branch, and both called twice before they go back."""
    network, replicas = Branches(), Replicas(topology)
    if topology.rank == 1:
        nn.init.zeros_(network.first.weight)  # the ranks go by the weights of the first
    call = replicas.call(network, network.forward, may_skip=True)
    own = BATCH.chunk(replicas.count)[replicas.rank]
    for index, which in enumerate(("first", "second")):
        with replicas.exchanging(call, now=index == 1):
            (call(which, own) + call(which, 2 * own)).backward()
    return {name: weight.grad for name, weight in network.named_parameters()}


def test_accumulated_gradients_of_skipped_branches_are_exchanged(walked):
    network = Branches()
    sum(network(which, BATCH) + network(which, 2 * BATCH) for which in ("first", "second")).backward()
    for rank in walked:
        for name, weight in network.named_parameters():
            if "never" in name:
                assert weight.grad is None and rank["branches"][name] is None
            else:
                torch.testing.assert_close(rank["branches"][name], weight.grad)


TRAININGS = {
    "plain": {},
    "accumulated": {"train.accumulation_steps": 2, "train.ema_decay": 0.9},
    "frozen": {"train.freeze_batch_norm_step": 1},
}
STEPS = 4


def configured(name: str) -> VisionTokenizerTrainingConfig:
    """The shipped configuration on small pictures and clips: plain, then with codes, then with restarts."""
    options = {
        "media.inputs": f"[{ROOT / 'examples/media/images'},{ROOT / 'examples/media/clips'}]",
        "media.size": 16,
        "media.batch_size": 8,
        "media.clip_share": 0.5,
        "media.augmented_share": 0.5,
        "model.codebook_size": 16,
        "model.ch_mult": "[1,1]",
        "model.attn_resolutions": "[]",
        "codebook.start_step": 1,
        "codebook.kmeans_batches": 2,
        "codebook.restart_interval": 2,
        "codebook.restart_until_step": 8,
        "optim.lr": 1e-5,
        "optim.min_lr": 0,
        "optim.lr_warmup_steps": 0,
        "optim.clip_grad": 0,
        "train.train_steps": 6,
        "train.precision": "fp32",
        "train.init": "emu3",
        "train.freeze_batch_norm_step": 0,
        **TRAININGS[name],
    }
    return load(
        VisionTokenizerTrainingConfig, [f"--config={EXAMPLE}", *(f"--{key}={value}" for key, value in options.items())]
    )


def training_on_a_rank(topology: Topology, name: str) -> list[dict[str, object]]:
    """Metrics, gradients and running statistics of every step."""
    config = configured(name)
    model = initial_model(config).train()
    media = TrainingMedia(
        config.media,
        seed=5,
        chunk_frames=4,
        accumulation_steps=config.train.accumulation_steps,
        rank=topology.data_parallel_rank,
        ranks=topology.data_parallel_size,
    )
    optimizer = NetworkOptimizer(model, config.optim, config.train.train_steps)
    train_step = TrainStep(config, model, optimizer, media, Replicas(topology))
    history = []
    for step in range(1, STEPS + 1):
        line = train_step.run(step)
        gradients = {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}
        statistics = {key: buffer.clone() for key, buffer in model.named_buffers()}
        history.append({"line": line, "gradients": gradients, "statistics": statistics})
    return history


@pytest.fixture(scope="module")
def alone():
    """The same trainings on one rank."""
    with Topology.start(RuntimeConfig(device="cpu", num_threads=1), ParallelConfig()) as topology:
        return {name: training_on_a_rank(topology, name) for name in TRAININGS}


@pytest.mark.parametrize("name", TRAININGS)
def test_two_ranks_train_as_one(walked, alone, name):
    for rank in walked:
        for mine, expected in zip(rank["trainings"][name], alone[name], strict=True):
            assert mine["line"].keys() == expected["line"].keys()
            for key, value in expected["line"].items():
                print(name, expected["line"]["step"], key, mine["line"][key], value)
            for part in ("gradients", "statistics"):
                assert mine[part].keys() == expected[part].keys()
                worst = max(
                    ((mine[part][key] - value).abs().max() / value.abs().max().clamp(min=1e-3)).item()
                    for key, value in expected[part].items()
                )
                print(name, expected["line"]["step"], part, worst)
    assert 0

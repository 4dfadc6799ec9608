"""A run that begins with given weights trains these weights, not the random ones it was built with."""

from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint.decoder import DecoderCheckpoint
from megatron_ext.config.checkpoint import CheckpointConfig
from megatron_ext.config.objective import ObjectiveConfig
from megatron_ext.config.optim import OptimConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.hf.release import write_release
from megatron_ext.model import Emu3Model, build_model
from megatron_ext.objectives import build_objective
from megatron_ext.optim import build_optimizer
from megatron_ext.runtime import Topology
from megatron_ext.train import resume_or_init
from megatron_ext.train.step import MicrobatchRunner
from megatron_ext.vision import MoVQGAN
from tests.support.decoding import global_batch
from tests.support.releases import source_of
from tests.support.small_models import DECODER, VISION, small_vocabulary
from tests.support.weights_only import save_weights


def write(kind: str, folder: Path, model: Emu3Model, topology: Topology) -> None:
    if kind == "checkpoint":
        save_weights(folder, model, topology, small_vocabulary(), "{}\n")
    else:
        write_release(folder, source_of(model, MoVQGAN(VISION).eval(), small_vocabulary()))


@pytest.mark.parametrize("kind", ["checkpoint", "hf"])
def test_the_first_update_starts_from_the_given_weights(tmp_path, kind):
    """The optimizer keeps master weights of its own: at learning rate 0 its update writes them into the model."""
    vocab, parallel = small_vocabulary(), ParallelConfig()
    with Topology.start(RuntimeConfig(device="cpu", precision="bf16"), parallel) as topology:
        given = build_model(DECODER, parallel, vocab.layout, topology, seed=1)
        write(kind, tmp_path / "given", given, topology)
        model = build_model(DECODER, parallel, vocab.layout, topology, seed=2)
        optimizer = build_optimizer(OptimConfig(lr=0.0), parallel, model, topology, steps=2)
        section = CheckpointConfig(init_from=str(tmp_path / "given"))
        checkpoint = DecoderCheckpoint(section, tmp_path / "run", optimizer, topology, vocab, {}, "{}\n")
        assert resume_or_init(section, checkpoint, optimizer, topology).step == 0
        runner = MicrobatchRunner(optimizer.model, build_objective(ObjectiveConfig(), vocab.layout), topology, seed=1)
        optimizer.zero_grad()
        runner.run(global_batch(0, 1, "document"), ("a", "b"), step=0)
        optimizer.step(1)
        for (name, found), expected in zip(model.named_parameters(), given.parameters(), strict=True):
            assert torch.equal(found, expected), name

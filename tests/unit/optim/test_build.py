"""The optimizer is torch's AdamW with a global clip, and norms do not decay: an oracle in plain torch."""

import pytest
import torch

from megatron_ext.config import InputError
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.objective import ObjectiveConfig
from megatron_ext.config.optim import OptimConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.model import build_model
from megatron_ext.objectives import build_objective
from megatron_ext.optim import build_optimizer
from megatron_ext.optim.gradient_groups import GROUPS, group_of
from megatron_ext.runtime import Topology
from megatron_ext.train.step import MicrobatchRunner
from tests.support.decoding import LAYOUT, MODEL, global_batch

OPTIM = OptimConfig(lr=1e-2, lr_decay_style="constant", weight_decay=0.3, clip_grad=0.2, adam_eps=1e-6)


@pytest.fixture
def topology():
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        yield topology


def test_a_start_logs_no_warning(topology, caplog):
    """megatron-core 0.19 has three at each start (megatron_ext/__init__.py says why they are left out)."""
    model = build_model(MODEL, ParallelConfig(), LAYOUT, topology, seed=1)
    build_optimizer(OPTIM, ParallelConfig(), model, topology, steps=8)
    assert not caplog.records


def squares_by_group(weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """Sum of squares of the gradient of each group, weight by weight."""
    sums = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head"), 0.0)
    for name, weight in weights.items():
        group = {
            "embedding.word_embeddings.weight": "embedding", "output_layer.weight": "head",
            "decoder.final_layernorm.weight": "norms",
        }.get(name)  # fmt: skip
        if group is None:
            group = {
                "linear_qkv": "attention",
                "linear_proj": "attention",
                "linear_fc1": "mlp",
                "linear_fc2": "mlp",
            }.get(name.split(".")[-2], "norms")
        sums[group] += weight.grad.double().square().sum().item()
    return sums


def test_steps_equal_plain_adamw(topology):
    model = build_model(MODEL, ParallelConfig(), LAYOUT, topology, seed=1)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    matrices = [weights[name] for name in weights if weights[name].dim() > 1]
    norms = [weights[name] for name in weights if weights[name].dim() == 1]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIM.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=OPTIM.lr, betas=(OPTIM.adam_beta1, OPTIM.adam_beta2), eps=OPTIM.adam_eps,
    )  # fmt: skip
    optimizer = build_optimizer(OPTIM, ParallelConfig(), model, topology, steps=3)
    runner = MicrobatchRunner(optimizer.model, build_objective(ObjectiveConfig(), LAYOUT), topology, seed=1)
    for step in range(3):
        optimizer.zero_grad()
        runner.run(global_batch(step, 1, "document"), ("a", "b"), step=step)
        for name, parameter in model.named_parameters():
            weights[name].grad = parameter.main_grad.clone()
        by_group = squares_by_group(weights)
        norm = torch.nn.utils.clip_grad_norm_(list(weights.values()), OPTIM.clip_grad)
        assert norm > OPTIM.clip_grad, "the test must clip"
        reference.step()
        assert optimizer.gradient_norm() == pytest.approx(norm.item(), rel=1e-5)
        for group, found in optimizer.groups.norms().items():
            assert found == pytest.approx(by_group[group] ** 0.5, rel=1e-5), group
        assert optimizer.step(step + 1).grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert (parameter - weights[name]).abs().max() < 1e-6, name  # measured 2e-8


def test_a_schedule_that_cannot_be_is_refused(topology):
    model = build_model(MODEL, ParallelConfig(), LAYOUT, topology, seed=1)
    with pytest.raises(InputError, match=r"lr_warmup_steps 5 is not below the 5 steps"):
        build_optimizer(OptimConfig(lr_warmup_steps=5), ParallelConfig(), model, topology, steps=5)


def test_every_weight_has_a_group(topology):
    model = build_model(
        ModelConfig(**{**vars(MODEL), "qk_layernorm": True}), ParallelConfig(), LAYOUT, topology, seed=1
    )
    groups = [group_of(name) for name, _ in model.named_parameters()]
    # a layer has 4 norms, 2 matrices of attention and 2 of the MLP
    layers = MODEL.num_layers
    assert [groups.count(name) for name in GROUPS] == [1, 2 * layers, 2 * layers, 4 * layers + 1, 1]
    # Transformer Engine's names, which fuse norms into the projections after them
    assert group_of("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight") == "norms"
    with pytest.raises(ValueError, match="none of embedding, attention"):
        group_of("decoder.layers.0.router.weight")

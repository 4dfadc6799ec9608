"""Schedule, clipping, weight decay and the refusal of steps that are not finite."""

import pytest
import torch
from torch import nn

from megatron_ext.config import InputError
from tokenizer_train.vision.config import VisionOptimConfig
from tokenizer_train.vision.optimizer import NetworkOptimizer


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 4)
        self.codes = nn.Embedding(5, 2)


def with_gradients(scale: float) -> Network:
    network = Network()
    for weight in network.parameters():
        weight.grad = torch.randn_like(weight) * scale
    return network


def optimizer(network: Network, **options: float) -> NetworkOptimizer:
    fields = {"lr": 0.1, "clip_grad": 0.0, "weight_decay": 0.0, "lr_warmup_steps": 2, "min_lr": 0.0} | options
    return NetworkOptimizer(network, VisionOptimConfig(**fields), 10, prefix="own_")


def test_clipping_by_norm_then_by_value():
    network = with_gradients(3.0)
    gradients = [weight.grad.clone() for weight in network.parameters()]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    line = optimizer(network, clip_grad=2.0, clip_grad_value=0.25).step(1)
    assert line == {"own_grad_norm": pytest.approx(norm.item()), "own_learning_rate": 0.05}
    for weight, gradient in zip(network.parameters(), gradients, strict=True):
        # torch divides by norm + 1e-6.
        torch.testing.assert_close(weight.grad, (gradient * 2 / norm).clamp(-0.25, 0.25), rtol=1e-5, atol=1e-7)


def test_only_matrices_decay():
    network = with_gradients(0.0)
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    optimizer(network, weight_decay=0.5).step(2)
    after = dict(network.named_parameters())
    torch.testing.assert_close(after["linear.weight"], before["linear.weight"] * (1 - 0.1 * 0.5))
    assert all(torch.equal(after[name], before[name]) for name in ("linear.bias", "codes.weight"))


def test_gradients_that_are_not_finite_move_nothing():
    network = with_gradients(1.0)
    network.linear.bias.grad[2] = torch.nan
    before = [weight.detach().clone() for weight in network.parameters()]
    with pytest.raises(InputError, match="step 3 has own_grad_norm nan"):
        optimizer(network, clip_grad=1.0).step(3)
    assert all(torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


def test_schedule_that_contradicts_itself():
    with pytest.raises(InputError, match="optim.lr_warmup_steps 20"):
        optimizer(Network(), lr_warmup_steps=20)

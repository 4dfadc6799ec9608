"""The optimizer of one network: AdamW, or Muon for its kernels; the schedule of the decoder's training, clipping, a
refusal of steps that are not finite."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from megatron_ext.config import InputError
from megatron_ext.config.validate import schedule_fault
from megatron_ext.optim.schedule import learning_rate
from tokenizer_train.vision.config import VisionOptimConfig
from tokenizer_train.vision.muon import Muon

NO_UNITS: Mapping[str, float] = MappingProxyType({})

HIDDEN_CHANNELS = 16
"""Channels on both sides from which on a kernel joins hidden layers; pixels, latents and scores have 1 to 4."""


class NetworkOptimizer:
    """The optimizer of one network and its schedule."""

    def __init__(
        self,
        network: nn.Module,
        optim: VisionOptimConfig,
        train_steps: int,
        *,
        prefix: str = "",
        units: Mapping[str, float] = NO_UNITS,
    ) -> None:
        """`train_steps`: length of the run. `prefix` stands before the names of the metrics.

        `units`: sizes that count as 1 for the weights of these names. Such a weight is clipped, stepped and decayed as
        its quotient by the unit would be.

        Raises:
            InputError: the schedule contradicts itself.
        """
        if fault := schedule_fault(optim, train_steps):
            raise InputError(fault)
        self.optim = optim
        self.prefix = prefix
        self.decay_steps = optim.lr_decay_steps or train_steps
        self.parameters = [weight for _, weight in _trained(network)]
        kernels = _hidden_kernels(network, units) if optim.optimizer == "muon" else []
        self.adam = torch.optim.AdamW(
            _groups(network, optim.weight_decay, units, without=kernels),
            lr=optim.lr,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_eps,
            fused=True,
        )
        """Has the codes in any case."""
        self.muon = Muon(kernels, lr=optim.lr, weight_decay=optim.weight_decay) if kernels else None

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step` (the first is 1)."""
        return learning_rate(
            step,
            peak=self.optim.lr,
            minimum=self.optim.min_lr,
            warmup_steps=self.optim.lr_warmup_steps,
            decay_steps=self.decay_steps,
            style=self.optim.lr_decay_style,
        )

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for weight in self.parameters:
            weight.grad = None

    def step(self, step: int) -> dict[str, float]:
        """Clip and update; the norm of the gradients before clipping and the learning rate, as metrics.

        Raises:
            InputError: the gradients are not finite; the weights are as they were.
        """
        rate = self.learning_rate(step)
        for group in self.adam.param_groups:
            group["lr"] = rate * group["unit"]
            if group["unit"] != 1.0:
                for weight in group["params"]:
                    if weight.grad is not None:
                        weight.grad *= group["unit"]
        total_norm = nn.utils.get_total_norm([weight.grad for weight in self.parameters if weight.grad is not None])
        norm = total_norm.item()
        if not math.isfinite(norm):
            raise InputError(
                f"step {step} has {self.prefix}grad_norm {norm}: nothing was saved since the last checkpoint; lower "
                "the learning rate, clip the gradients (clip_grad), or look at the media"
            )
        if self.optim.clip_grad:
            nn.utils.clip_grads_with_norm_(self.parameters, self.optim.clip_grad, total_norm)
        if self.optim.clip_grad_value:
            nn.utils.clip_grad_value_(self.parameters, self.optim.clip_grad_value)
        self.adam.step()
        if self.muon is not None:
            for group in self.muon.param_groups:
                group["lr"] = rate
            self.muon.step()
        return {f"{self.prefix}grad_norm": norm, f"{self.prefix}learning_rate": rate}

    def state_dict(self) -> dict[str, Any]:
        """Moments and step of every weight."""
        return self.adam.state_dict() | ({"muon": self.muon.state_dict()} if self.muon is not None else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up saved moments."""
        self.adam.load_state_dict(state)
        if self.muon is not None:
            self.muon.load_state_dict(state["muon"])


def _trained(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What the optimizer may move: not what is frozen when it is made."""
    return [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]


def _hidden_kernels(network: nn.Module, units: Mapping[str, float]) -> list[nn.Parameter]:
    """The kernels that Muon is for (Jordan et al. 2024): not those of the first and last layers, nor scaled ones."""
    return [
        weight
        for name, weight in _trained(network)
        if weight.ndim >= 4 and min(weight.shape[:2]) >= HIDDEN_CHANNELS and name not in units
    ]


def _groups(
    network: nn.Module, weight_decay: float, units: Mapping[str, float], *, without: Sequence[nn.Parameter]
) -> list[dict[str, Any]]:
    """Matrices and kernels decay; norms and biases, and codes, which live where the latents are, do not."""
    codes = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    others = {id(weight) for weight in without}
    members: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, weight in _trained(network):
        if id(weight) not in others:
            decays = weight.ndim > 1 and id(weight) not in codes
            members.setdefault((decays, units.get(name, 1.0)), []).append(weight)
    return [
        {"params": weights, "unit": unit, "weight_decay": weight_decay / unit if decays else 0.0}
        for (decays, unit), weights in members.items()
    ]

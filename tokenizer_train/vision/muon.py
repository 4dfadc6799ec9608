"""Muon: kernels are stepped by their momentum with all singular values brought to about 1 (Jordan et al. 2024).

torch.optim.Muon takes matrices only, one after the other. Here kernels of equal shape go through the iteration
together: a convolutional network has many small ones, and for the quickstart's tokenizer that takes half the time.

Shapes: N kernels of one shape, O output channels, I numbers that each of them sees (input channels times taps).
Source: kellerjordan.github.io/posts/muon, cited as J; Liu et al. 2025, "Muon is scalable for LLM training", as L.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5 in a round: the steepest start that ends between 0.7 and 1.2 (J, "Tuning the coefficients")."""

ROUNDS = 5
"""Enough for singular values from 1/1000 of the length on (J)."""

MOMENTUM = 0.95
"""Decay of the momentum, which is Nesterov's (J)."""

ADAM_RMS = 0.2
"""Root mean square of AdamW's updates at a learning rate of 1; with it both share learning rate and decay (L 2.2)."""

EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Steps kernels [O, ...], seen as matrices [O, I], at AdamW's learning rates and weight decays."""

    def __init__(self, kernels: Iterable[nn.Parameter], *, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(kernels, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Step every kernel that has a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for kernel in group["params"]:
                if kernel.grad is not None:
                    alike.setdefault(kernel.shape, []).append(kernel)
            for kernels in alike.values():
                updates_NOI = orthogonalized(torch.stack([self._direction(kernel) for kernel in kernels]))
                rate = group["lr"] * ADAM_RMS * max(updates_NOI.shape[1:]) ** 0.5
                for kernel, update_OI in zip(kernels, updates_NOI, strict=True):
                    kernel.mul_(1 - group["lr"] * group["weight_decay"])
                    kernel.sub_(update_OI.view(kernel.shape), alpha=rate)

    def _direction(self, kernel: nn.Parameter) -> Tensor:
        """[O, I]: the gradient after Nesterov's momentum."""
        state = self.state[kernel]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(kernel)
        momentum = state["momentum_buffer"].lerp_(kernel.grad, 1 - MOMENTUM)
        return kernel.grad.lerp(momentum, MOMENTUM).flatten(1)


def orthogonalized(matrices_NOI: Tensor) -> Tensor:
    """Float32 [N, O, I]: U V' of each matrix U S V', up to singular values between 0.7 and 1.2, by Newton and Schulz's
    iteration; in float32, because bfloat16, which is enough for it and upstream's choice, takes 12 times as long on a
    CPU that does not multiply it, and there most of a small tokenizer's step."""
    is_tall = matrices_NOI.shape[1] > matrices_NOI.shape[2]
    x_NOI = matrices_NOI.mT if is_tall else matrices_NOI
    x_NOI = (x_NOI / x_NOI.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)).float()
    first, third, fifth = COEFFICIENTS
    for _ in range(ROUNDS):
        gram_NOO = x_NOI @ x_NOI.mT
        powers_NOO = torch.baddbmm(gram_NOO, gram_NOO, gram_NOO, beta=third, alpha=fifth)
        x_NOI = torch.baddbmm(x_NOI, powers_NOO, x_NOI, beta=first)
    return x_NOI.mT if is_tall else x_NOI

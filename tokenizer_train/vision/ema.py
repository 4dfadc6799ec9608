"""Exponential moving average of a network's weights: smoother than the weights that the last batches pulled at."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of what a network's weights and running statistics were after each step."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Starts from the weights as they are; `decay` in (0, 1) is the share of the old average that a step keeps."""
        self._network = network
        self._decay = decay
        self._average = {name: tensor.detach().clone() for name, tensor in self._live().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (the first is 1).

        Until step 10 / (1 - decay) or so the average is over a tenth of the steps so far: decay (1 + n) / (10 + n)
        after n steps, as tf.train.ExponentialMovingAverage(num_updates=n) and the MoVQGAN trainer's LitEma have it.
        The random start is forgotten soon, whatever the decay.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        live = self._live()
        names = [name for name in live if live[name].is_floating_point()]
        torch._foreach_lerp_([self._average[name] for name in names], [live[name] for name in names], 1 - decay)
        for name in live.keys() - set(names):
            self._average[name].copy_(live[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, the network computes with the average; then its own weights are back. Nothing is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state_dict(self) -> dict[str, Tensor]:
        """The average under the network's own names."""
        return self._average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up a saved average. Raises RuntimeError where it is not this network's."""
        if wrong := state.keys() ^ self._average.keys():
            raise RuntimeError(f"the average of another network: {sorted(wrong)[0]} is in one of them only")
        for name, tensor in self._average.items():
            tensor.copy_(state[name])

    def _live(self) -> dict[str, Tensor]:
        """Every weight and saved statistic; the tensors share the network's memory."""
        return self._network.state_dict()

    def _exchange(self) -> None:
        for name, tensor in self._network.state_dict(keep_vars=True).items():
            tensor.data, self._average[name] = self._average[name], tensor.data

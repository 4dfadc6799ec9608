"""The discriminator and its learning: what the tokenizer plays against.

Shapes: N pictures, B clips, T frames, C colour channels, H W pixels.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ext.runtime.device import autocast
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig
from tokenizer_train.vision.data import torch_generator
from tokenizer_train.vision.discriminator import Discriminator
from tokenizer_train.vision.losses import discriminator_loss
from tokenizer_train.vision.optimizer import NetworkOptimizer
from tokenizer_train.vision.parallel import Replicas


class Adversary:
    """A discriminator with its optimizer. Batches are pictures [N, C, H, W] or clips [B, T, C, H, W]."""

    def __init__(self, config: VisionTokenizerTrainingConfig, device: torch.device, replicas: Replicas) -> None:
        """The same on every rank: initial weights are a function of the seed.

        Raises:
            InputError: the schedule of its optimizer contradicts itself.
        """
        section, train = config.discriminator, config.train
        self._start_step = section.start_step
        self._autocast = autocast(device, train.precision)
        self._replicas = replicas
        torch.manual_seed(torch_generator(train.seed, "discriminator").initial_seed())
        self.network = Discriminator(section, clip_share=config.media.clip_share).to(device).train()
        replicas.join_batch_norms(self.network)
        self.optimizer = NetworkOptimizer(
            self.network, section.optim, train.train_steps - section.start_step, prefix="discriminator_"
        )
        # A step of pictures leaves the network for clips alone, and the other way round.
        self._score_both = replicas.call(self.network, self._scores_of_both, may_skip=True)

    def learns_at(self, step: int) -> bool:
        """Whether step `step` (the first is 1) has a step of the discriminator."""
        return step > self._start_step

    def scores(self, drawn: Tensor) -> Tensor:
        """Scores of what the tokenizer drew; the gradient comes to `drawn` and leaves the discriminator alone."""
        with self._frozen():
            return self._scores(drawn)

    def learn(self, step: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """One step of its own from the micro-batches of a step, each (real, drawn); its metrics.

        Real and drawn ones pass separately, as in SBER's trainer, so that a batch norm does not mix them.

        Raises:
            InputError: the gradients are not finite.
        """
        self.optimizer.zero_grad()
        found = []
        for index, (real, drawn) in enumerate(pairs):
            with self._replicas.exchanging(self._score_both, now=index == len(pairs) - 1):
                real_scores, drawn_scores = self._score_both(real, drawn.detach())
                loss = discriminator_loss(real_scores, drawn_scores)
                (loss / len(pairs)).backward()
            found.append(torch.stack([loss.detach(), real_scores.detach().mean(), drawn_scores.detach().mean()]))
        means = self._replicas.mean(torch.stack(found).mean(0)).tolist()
        names = ("loss_discriminator", "score_real", "score_drawn")
        return dict(zip(names, means, strict=True)) | self.optimizer.step(step - self._start_step)

    def state_dict(self) -> dict[str, Any]:
        """Weights, running statistics and moments."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _scores(self, pixels: Tensor) -> Tensor:
        with self._autocast:
            scores = self.network(pixels)
        return scores.float()

    def _scores_of_both(self, real: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        return self._scores(real), self._scores(drawn)

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        self.network.requires_grad_(False)
        try:
            yield
        finally:
            self.network.requires_grad_(True)

"""From logits to one id: guidance, the grammar's ranges, temperature, top-k, top-p, a generator per sample.

Shapes: V ids of the vocabulary, C candidates (the ids that may come next).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from megatron_ext.config.section import NonNegative, Number, Section, Share, above


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Section):
    """How the next id is drawn; the defaults are Emu3's for pictures (E3 image_generation.py:31-56)."""

    temperature: NonNegative = 1.0
    """Divides the logits before sampling; 0 takes the likeliest id."""

    top_k: Number = 2048
    """Only the likeliest this many may be drawn; 0 turns it off."""

    top_p: Annotated[Share, above(0)] = 1.0
    """Only the likeliest ids that together reach this probability may be drawn; 1 turns it off."""

    guidance_scale: NonNegative = 3.0
    """Classifier-free guidance: weight of the prompt against the negative prompt; 1 turns it off."""


def seeded_generator(seed: int, sample: int) -> torch.Generator:
    """The random numbers of one sample: a function of the seed and the sample's number, never of its batch."""
    generator = torch.Generator()
    generator.manual_seed(int(np.random.SeedSequence([seed, sample]).generate_state(1, np.uint64)[0] >> 1))
    return generator


def guide(conditional: Tensor, unconditional: Tensor | None, scale: float) -> Tensor:
    """u + scale (c - u), for logits of any shape (E3 image_generation.py, transformers' classifier-free guidance).

    There it is applied to log-probabilities; the two normalisers are the same for all ids and drop out of the softmax.
    """
    if unconditional is None:
        return conditional
    return unconditional + scale * (conditional - unconditional)


def sample(
    conditional_V: Tensor,
    unconditional_V: Tensor | None,
    ranges: Sequence[tuple[int, int]],
    config: SamplingConfig,
    generator: torch.Generator,
) -> int:
    """One id out of the `[low, high)` ranges.

    Order as in the reference: guidance, grammar, temperature, top-k, top-p (E3#image_generation.py, transformers'
    logits processors). An id that is the only one allowed costs no random number.
    """
    candidates_C = torch.cat([torch.arange(low, high) for low, high in ranges])
    if candidates_C.numel() == 1:
        return int(candidates_C)
    conditional_C = _pick(conditional_V, ranges)
    unconditional_C = None if unconditional_V is None else _pick(unconditional_V, ranges)
    logits_C = guide(conditional_C, unconditional_C, config.guidance_scale)
    if config.temperature == 0:
        return int(candidates_C[logits_C.argmax()])
    probabilities_C = filtered_probabilities(logits_C / config.temperature, config.top_k, config.top_p)
    return int(candidates_C[torch.multinomial(probabilities_C, 1, generator=generator)])


def filtered_probabilities(logits_C: Tensor, top_k: int, top_p: float) -> Tensor:
    """Softmax over the top_k likeliest and, of these, the fewest that reach probability top_p; the others are 0."""
    if 0 < top_k < logits_C.numel():
        kept = torch.full_like(logits_C, -torch.inf)
        values, indices = logits_C.topk(top_k)
        logits_C = kept.scatter(0, indices, values)
    probabilities_C = logits_C.softmax(0)
    if top_p < 1:
        ordered, order = probabilities_C.sort(descending=True)
        # The id with which the sum reaches top_p still belongs to the set.
        ordered[ordered.cumsum(0) - ordered >= top_p] = 0
        probabilities_C = torch.zeros_like(probabilities_C).scatter(0, order, ordered / ordered.sum())
    return probabilities_C


def _pick(logits_V: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Logits of the candidates, in float32 on the CPU, where the generators live: equal draws on every device."""
    return torch.cat([logits_V[low:high] for low, high in ranges]).float().cpu()

"""The loop: one step of the decoder, one id per sequence, until every sequence has reached its stop."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from megatron_ext.generate.decoder import CachedDecoder
from megatron_ext.generate.prompts import Prompt
from megatron_ext.generate.sampling import SamplingConfig, sample, seeded_generator
from megatron_ext.vocab.grammar import Grammar, State


class _Sequence:
    """One prompt and what has been drawn for it."""

    def __init__(self, prompt: Prompt, grammar: Grammar, seed: int) -> None:
        self.prompt = prompt
        self.grammar = grammar
        self.state: State = grammar.advance_all(prompt.ids)
        self.generator = seeded_generator(seed, prompt.sample)
        self.drawn: list[int] = []

    @property
    def is_finished(self) -> bool:
        return bool(self.drawn) and self.drawn[-1] == self.prompt.stop

    def draw(self, conditional_V: torch.Tensor, unconditional_V: torch.Tensor | None, config: SamplingConfig) -> None:
        """Append the next id."""
        room = self.prompt.max_new_ids - len(self.drawn)
        ranges = _without(self.grammar.allowed(self.state, room), self.prompt.forbidden)
        token_id = sample(conditional_V, unconditional_V, ranges, config, self.generator)
        self.state = self.grammar.advance(self.state, token_id)
        self.drawn.append(token_id)


def generate(
    decoder: CachedDecoder,
    grammar: Grammar,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    *,
    seed: int,
    on_step: Callable[[int], None] = lambda drawn: None,
) -> list[np.ndarray]:
    """Continue each prompt until its stop; the drawn ids, int32 [N] each, the stop included.

    With guidance a prompt that has an unconditional sequence takes two rows of the batch, which are fed the same ids.
    A sample depends on the seed and its number, not on what else is in the batch.

    Args:
        on_step: called after each step with the number of ids drawn in it, for progress.

    Raises:
        DocumentError: a prompt is not the beginning of a document.
    """
    sequences = [_Sequence(prompt, grammar, seed) for prompt in prompts]
    guided = [
        row for row, prompt in enumerate(prompts) if prompt.unconditional is not None and config.guidance_scale != 1
    ]
    # Row of the batch that holds a prompt's unconditional sequence.
    partner = {row: len(prompts) + number for number, row in enumerate(guided)}
    rows = [prompt.ids for prompt in prompts] + [prompts[row].unconditional for row in guided]
    logits_BV = decoder.prefill([torch.from_numpy(ids.astype(np.int64)) for ids in rows])
    while True:
        drawing = [row for row, sequence in enumerate(sequences) if not sequence.is_finished]
        for row in drawing:
            unconditional_V = logits_BV[partner[row]] if row in partner else None
            sequences[row].draw(logits_BV[row], unconditional_V, config)
        on_step(len(drawing))
        if all(sequence.is_finished for sequence in sequences):
            return [np.array(sequence.drawn, dtype=np.int32) for sequence in sequences]
        # A finished sequence is fed its last id again; nothing reads what follows.
        last = [sequence.drawn[-1] for sequence in sequences]
        logits_BV = decoder.step(torch.tensor(last + [last[row] for row in guided]))


def _without(ranges: Sequence[tuple[int, int]], forbidden: Sequence[int]) -> list[tuple[int, int]]:
    """The `[low, high)` ranges without some ids."""
    remaining = list(ranges)
    for token_id in forbidden:
        remaining = [
            part
            for low, high in remaining
            for part in ((low, min(high, token_id)), (max(low, token_id + 1), high))
            if part[0] < part[1]
        ]
    return remaining

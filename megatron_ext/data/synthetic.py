"""Windows of random documents, made when asked for: to check the stack itself with, where no dataset is at hand."""

from dataclasses import dataclass

import numpy as np

from megatron_ext.data.windows import Window
from megatron_ext.vocab import VocabLayout

VISUAL_SHARE = 0.5
"""Share of visual ids: enough of each modality in every window to compare its loss."""


@dataclass(frozen=True, kw_only=True)
class RandomDocuments:
    """What `PackedDataset` gives, without files: window w is a function of (seed, w).

    Documents have random lengths, each is padded to `alignment`, and up to half of a window is left empty: labels fall
    unevenly on windows and on the chunks of context ranks.
    """

    name: str
    layout: VocabLayout
    seq_length: int
    alignment: int
    seed: int
    size: int = 1 << 20
    """Windows."""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, window: int) -> Window:
        rng = np.random.default_rng([self.seed, window])
        ids = np.full(self.seq_length, self.layout.pad, dtype=np.int64)
        labels = ids.copy()
        mask = np.zeros(self.seq_length, dtype=bool)
        boundaries = [0]
        filled = int(rng.integers(self.seq_length // 2, self.seq_length + 1))
        while boundaries[-1] < filled:
            begin = boundaries[-1]
            length = min(int(rng.integers(1, self.seq_length // 2 + 2)), self.seq_length - begin)
            piece = self._draw(rng, length)
            ids[begin : begin + length] = piece
            labels[begin : begin + length - 1] = piece[1:]
            mask[begin : begin + length - 1] = True
            boundaries.append(min(self.seq_length, begin - (-length // self.alignment) * self.alignment))
        if boundaries[-1] < self.seq_length:
            boundaries.append(self.seq_length)
        return Window(ids, labels, mask, np.array(boundaries))

    def _draw(self, rng: np.random.Generator, length: int) -> np.ndarray:
        visual = rng.random(length) < VISUAL_SHARE
        low, high = (
            np.where(visual, self.layout.visual_start, 0),
            np.where(visual, self.layout.size, self.layout.visual_start),
        )
        return rng.integers(low, high)

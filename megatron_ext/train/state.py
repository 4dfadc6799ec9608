"""What must survive a kill, declared in one place."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainState:
    """Progress of a run. With the weights and the optimizer it is all that a resume needs: data order and dropout are
    functions of (seed, these numbers).
    """

    step: int = 0
    """Optimizer steps done."""

    consumed_samples: int = 0
    """Windows trained on."""

    consumed_tokens: int = 0
    """Ids of those windows, padding included."""

    def advance(self, samples: int, seq_length: int) -> "TrainState":
        """The state after one more optimizer step over `samples` windows."""
        return TrainState(self.step + 1, self.consumed_samples + samples, self.consumed_tokens + samples * seq_length)

    def as_dict(self) -> dict[str, int]:
        """Plain data for a checkpoint's manifest."""
        return dataclasses.asdict(self)

"""What must survive a kill, declared in one place."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_ext.data.progress import BlendProgress


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

    blend: BlendProgress | None = None
    """What was read of each dataset; None before the first step."""

    def advance(self, samples: int, seq_length: int, blend: BlendProgress) -> "TrainState":
        """The state after one more optimizer step over `samples` windows, where it has read `blend`."""
        return TrainState(
            self.step + 1, self.consumed_samples + samples, self.consumed_tokens + samples * seq_length, blend
        )

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "TrainState":
        """From what `as_dict` made, and JSON may have held."""
        blend = content.get("blend")
        return cls(**{**content, "blend": blend and BlendProgress.from_dict(blend)})

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint's manifest."""
        return dataclasses.asdict(self)

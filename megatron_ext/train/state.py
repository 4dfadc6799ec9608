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
    """Windows trained on or passed over: the place in the order of the data."""

    consumed_tokens: int = 0
    """Ids trained on, padding included."""

    passed_over: tuple[tuple[int, int], ...] = ()
    """Ranges [begin, end) of samples that a rewound run leaves out, in order."""

    measured: tuple[tuple[float, float], ...] = ()
    """(loss, gradient norm) of the last good steps, where spikes are looked for."""

    blend: BlendProgress | None = None
    """What was read of each dataset, passed over included; None before the first step."""

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "TrainState":
        """The state that `as_dict` gave, perhaps through JSON."""
        pairs = {name: tuple(map(tuple, saved.get(name, ()))) for name in ("passed_over", "measured")}
        blend = saved.get("blend")
        return cls(**saved | pairs | {"blend": blend and BlendProgress.from_dict(blend)})

    def advance(self, samples: int, seq_length: int, blend: BlendProgress) -> "TrainState":
        """The state after one more optimizer step over `samples` windows, where it has read `blend`."""
        return dataclasses.replace(
            self,
            step=self.step + 1,
            consumed_samples=self.consumed_samples + samples,
            consumed_tokens=self.consumed_tokens + samples * seq_length,
            blend=blend,
        )

    def remember(self, measured: tuple[tuple[float, float], ...]) -> "TrainState":
        """The state with other measurements of the last good steps."""
        return dataclasses.replace(self, measured=measured)

    def rewind(self, saved: "TrainState", begin: int, end: int) -> "TrainState":
        """The earlier state `saved`, which from now on leaves out the samples [begin, end) as well as all that this one
        leaves out: what was found since it was saved would be met again."""
        ahead = {(first, last) for first, last in self.passed_over if last > saved.consumed_samples}
        found = (max(begin, saved.consumed_samples), end)
        return dataclasses.replace(saved, passed_over=tuple(sorted({*saved.passed_over, *ahead, found})))

    def past_the_passed_over(self) -> "TrainState":
        """The state at the next sample that is trained on."""
        consumed = self.consumed_samples
        for begin, end in self.passed_over:
            if begin <= consumed < end:
                consumed = end
        return dataclasses.replace(self, consumed_samples=consumed)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint's manifest."""
        return dataclasses.asdict(self)

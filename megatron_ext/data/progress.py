"""What a run has read of each dataset, as its checkpoints hold it, and how another blend goes on from there.

With the blend unchanged a resumed run goes on in the order it began with. With other weights, and with other datasets
where data.allow_change says so, a new order begins at the samples consumed so far; in it every dataset that stays goes
on with its next window, and its epochs keep their permutations.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ext.config import InputError
from megatron_ext.data.order import BlendStart


@dataclass(frozen=True, kw_only=True)
class DatasetProgress:
    """A dataset of a run, and how far the run is in it."""

    name: str
    identity: str
    """Of its windows."""
    number: int
    """Keys its permutations; no two datasets of a run share one."""
    slots: int
    """Its samples in a period of the blend; 0 where the blend has it no longer."""
    before: int
    """Windows consumed before the blend's first sample."""
    consumed: int
    """Windows consumed."""


@dataclass(frozen=True, kw_only=True)
class BlendProgress:
    """Progress of a run in its blend."""

    seed: int
    first_sample: int
    """Sample of the run with which the blend, as it is, began."""
    datasets: tuple[DatasetProgress, ...]
    """In the blend's order; then those that it has no longer."""

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "BlendProgress":
        """From what `dataclasses.asdict` made, and JSON may have held."""
        return cls(**{**content, "datasets": tuple(DatasetProgress(**dataset) for dataset in content["datasets"])})

    @property
    def active(self) -> tuple[DatasetProgress, ...]:
        """The datasets of the blend."""
        return tuple(dataset for dataset in self.datasets if dataset.slots)


@dataclass(frozen=True, kw_only=True)
class BlendChange:
    """How a restart changed the blend."""

    sample: int
    """The first of the new blend."""
    added: tuple[str, ...]
    removed: tuple[str, ...]
    shares_before: dict[str, float]
    """Share of the windows, by dataset."""
    shares: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """How a blend goes on from what a checkpoint says."""

    start: BlendStart
    past: tuple[DatasetProgress, ...]
    """Datasets that the blend has no longer."""
    change: BlendChange | None
    """None where the blend is the checkpoint's."""


def go_on(saved: BlendProgress, fresh: BlendProgress, samples: int, allow_change: bool) -> Continuation:
    """How the blend `fresh`, as the configuration has it at a run's beginning, goes on after `samples` samples.

    Raises:
        InputError: another seed; datasets that came or went, without `allow_change`.
    """
    if saved.seed != fresh.seed:
        raise InputError(f"train.seed is {fresh.seed}, the run began with {saved.seed}: go on with that, or start anew")
    found, rest = _match(fresh.datasets, saved.datasets)
    added = tuple(
        ours.name for ours, theirs in zip(fresh.datasets, found, strict=True) if not (theirs and theirs.slots)
    )
    removed = tuple(dataset.name for dataset in rest if dataset.slots)
    if (added or removed) and not allow_change:
        raise InputError(_refusal(added, removed))
    unused = max(dataset.number for dataset in saved.datasets) + 1
    numbers = []
    for theirs in found:
        numbers.append(theirs.number if theirs else unused)
        unused += theirs is None
    if [(d.number, d.slots) for d in saved.active] == list(
        zip(numbers, [d.slots for d in fresh.datasets], strict=True)
    ):
        before = tuple(dataset.before for dataset in saved.active)
        start = BlendStart(sample=saved.first_sample, numbers=tuple(numbers), consumed=before)
        return Continuation(start=start, past=rest, change=None)
    consumed = tuple(theirs.consumed if theirs else 0 for theirs in found)
    return Continuation(
        start=BlendStart(sample=samples, numbers=tuple(numbers), consumed=consumed),
        past=tuple(DatasetProgress(**{**asdict(dataset), "slots": 0}) for dataset in rest),
        change=BlendChange(
            sample=samples,
            added=added,
            removed=removed,
            shares_before=_shares(saved.active),
            shares=_shares(fresh.datasets),
        ),
    )


def _match(
    ours: Sequence[DatasetProgress], saved: Sequence[DatasetProgress]
) -> tuple[list[DatasetProgress | None], tuple[DatasetProgress, ...]]:
    """For each of ours the saved one with the same windows, and the saved ones that are left."""
    rest = list(saved)
    found = []
    for dataset in ours:
        same = next((candidate for candidate in rest if candidate.identity == dataset.identity), None)
        found.append(same)
        if same is not None:
            rest.remove(same)
    return found, tuple(rest)


def _refusal(added: Sequence[str], removed: Sequence[str]) -> str:
    both = sorted(set(added) & set(removed))
    parts = [
        f"{', '.join(both)} has other windows than it had" if both else "",
        f"the run has not read {', '.join(added)}" if added and not both else "",
        f"it has read {', '.join(removed)}, which data.train lacks" if removed and not both else "",
    ]
    return (
        f"data.train has changed: {'; '.join(filter(None, parts))}: go on with the datasets, train.seq_length and "
        "packing of before, set data.allow_change true to go on with these, or start another observe.run_dir"
    )


def _shares(datasets: Sequence[DatasetProgress]) -> dict[str, float]:
    total = sum(dataset.slots for dataset in datasets)
    return {dataset.name: dataset.slots / total for dataset in datasets}

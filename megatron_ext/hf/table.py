"""A conversion is a table of rules, written in one direction; the other direction is derived.

A rule pairs one tensor of ours with one or more of theirs. Names are patterns: `{layer}` stands for a number, and the
same placeholders appear on both sides. Values are related by an index: row i of our tensor is row `index[i]` of their
tensors stacked, or a row of zeros where `index[i]` is -1 (padding). Being an injection on the rest, the index has an
inverse, which is the other direction. A shard of tensor parallelism is nothing but a part of the index.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

Index = Callable[[int, int], torch.Tensor]
"""(rank, size) -> int64 indices of that shard's rows in their stacked rows; -1 is a padding row."""

PADDING = -1

_PLACEHOLDERS = {"coder": "encoder|decoder", "kind": "weight|bias", "rest": ".+"}
"""What a placeholder matches; every other one matches a number."""


class UnknownName(KeyError):
    """No rule of the table knows this tensor name."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One tensor of ours = some of theirs, stacked along dimension 0 and reordered."""

    ours: str
    """Pattern of our tensor's name."""

    theirs: tuple[str, ...]
    """Patterns of their tensors' names, in the order in which they are stacked."""

    sizes: tuple[int, ...] | None = None
    """Rows of each of their tensors; None: one tensor whose rows are ours."""

    index: Index | None = None
    """Which of their rows a shard of ours holds; None: all in order, or an even cut along shard_dim."""

    shard_dim: int | None = None
    """Dimension that tensor parallelism cuts where there is no index; None: every rank holds all."""

    pointwise: bool = False
    """Our weight is a 1x1 convolution, theirs the matrix of a linear layer."""

    def to_ours(self, theirs: list[torch.Tensor], rank: int = 0, size: int = 1) -> torch.Tensor:
        """Shard `rank` of `size` of our tensor."""
        stacked = theirs[0] if len(theirs) == 1 else torch.cat(theirs)
        if self.index is not None:
            index = self.index(rank, size).to(stacked.device)
            ours = stacked[index.clamp(min=0)]
            ours[index == PADDING] = 0
            return ours
        if self.shard_dim is not None and size > 1:
            return stacked.chunk(size, dim=self.shard_dim)[rank].contiguous()
        return stacked[..., None, None] if self.pointwise else stacked

    def to_theirs(self, shards: list[torch.Tensor]) -> list[torch.Tensor]:
        """Their tensors, from all shards of ours in rank order: the inverse of `to_ours`."""
        if self.index is not None:
            index = torch.cat([self.index(rank, len(shards)) for rank in range(len(shards))]).to(shards[0].device)
            kept = index != PADDING
            inverse = torch.empty(int(kept.sum()), dtype=torch.int64, device=index.device)
            inverse[index[kept]] = torch.arange(index.numel(), device=index.device)[kept]
            stacked = (shards[0] if len(shards) == 1 else torch.cat(shards))[inverse]
        else:
            stacked = shards[0] if self.shard_dim is None else torch.cat(shards, dim=self.shard_dim)
        if self.pointwise:
            stacked = stacked.flatten(1)
        return list(stacked.split(self.sizes)) if self.sizes and len(self.sizes) > 1 else [stacked]


@dataclass(frozen=True)
class Match:
    """A rule applied to actual names."""

    rule: Rule
    ours: str
    theirs: tuple[str, ...]


class Table:
    """Rules in order of precedence: the first whose pattern matches a name decides, in either direction."""

    def __init__(self, rules: Iterable[Rule]):
        self.rules = tuple(rules)
        self._by_ours = [(_compile(rule.ours), rule) for rule in self.rules]
        self._by_theirs = [(_compile(name), rule) for rule in self.rules for name in rule.theirs]

    def match_ours(self, name: str) -> Match:
        """The rule of our tensor `name`. Raises UnknownName."""
        return self._match(name, self._by_ours)

    def match_theirs(self, name: str) -> Match:
        """The rule of their tensor `name`. Raises UnknownName."""
        return self._match(name, self._by_theirs)

    def _match(self, name: str, patterns: list[tuple[re.Pattern, Rule]]) -> Match:
        for pattern, rule in patterns:
            if found := pattern.fullmatch(name):
                values = found.groupdict()
                return Match(rule, rule.ours.format(**values), tuple(their.format(**values) for their in rule.theirs))
        raise UnknownName(name)

    def to_theirs(self, ours: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Their (name, tensor) pairs from ours, unsharded, one rule at a time: nothing accumulates."""
        for name, tensor in ours:
            match = self.match_ours(name)
            yield from zip(match.theirs, match.rule.to_theirs([tensor]), strict=True)

    def to_ours(self, theirs: dict[str, torch.Tensor], rank: int = 0, size: int = 1) -> dict[str, torch.Tensor]:
        """Shard `rank` of `size` of our tensors from theirs. Raises KeyError when a part of one of ours is missing."""
        matches = {match.ours: match for match in map(self.match_theirs, theirs)}
        return {
            name: match.rule.to_ours([theirs[their] for their in match.theirs], rank, size)
            for name, match in matches.items()
        }


def _compile(pattern: str) -> re.Pattern:
    """`decoder.layers.{layer}.x` -> a regular expression with one named group per placeholder."""
    parts = re.split(r"\{(\w+)\}", pattern)
    expression = "".join(
        f"(?P<{part}>{_PLACEHOLDERS.get(part, '[0-9]+')})" if position % 2 else re.escape(part)
        for position, part in enumerate(parts)
    )
    return re.compile(expression)

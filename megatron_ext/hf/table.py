"""A conversion is a table of rules, written in one direction; the other direction is derived.

A rule pairs one tensor of ours with one or more of theirs. Names are patterns: `{layer}` stands for a number, and the
same placeholders appear on both sides. Values are related by an index: row i of our tensor is row `index[i]` of their
tensors stacked, or a row of zeros where `index[i]` is -1 (padding). Being an injection on the rest, the index has an
inverse, which is the other direction. A shard of tensor parallelism is nothing but a part of the index. Tensors are
lazy: a conversion reads the rows that are asked for.
"""

import bisect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from megatron_ext.checkpoint.lazy import LazyTensor

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
    """Which of their rows a shard of ours holds; None: all in order, or cut by columns."""

    by_columns: bool = False
    """Tensor parallelism cuts dimension 1; otherwise, and where there is no index, every rank holds all."""

    pointwise: bool = False
    """Our weight is a 1x1 convolution, theirs the matrix of a linear layer."""

    def to_ours(self, theirs: list[LazyTensor], rank: int = 0, size: int = 1) -> LazyTensor:
        """Shard `rank` of `size` of our tensor."""
        if self.index is not None:
            return gather(theirs, self.index(rank, size))
        (tensor,) = theirs
        if self.by_columns and size > 1:
            return _columns(tensor, rank, size)
        return _reshaped(tensor, (*tensor.shape, 1, 1)) if self.pointwise else tensor

    def to_theirs(self, shards: list[LazyTensor]) -> list[LazyTensor]:
        """Their tensors, from all shards of ours in rank order: the inverse of `to_ours`."""
        if self.index is not None:
            index = torch.cat([self.index(rank, len(shards)) for rank in range(len(shards))])
            kept = index != PADDING
            inverse = torch.empty(int(kept.sum()), dtype=torch.int64)
            inverse[index[kept]] = torch.arange(index.numel())[kept]
            return [gather(shards, part) for part in inverse.split(self.sizes)]
        tensor = _side_by_side(shards) if self.by_columns and len(shards) > 1 else shards[0]
        return [_reshaped(tensor, tensor.shape[:-2]) if self.pointwise else tensor]


def gather(sources: list[LazyTensor], index: torch.Tensor) -> LazyTensor:
    """Rows `index` of the sources stacked, zeros where it is PADDING; consecutive rows are read in one go."""
    first, ends = sources[0], list(itertools.accumulate(source.rows for source in sources))
    # A run ends where the next row is not the next of the same source.
    breaks = (index.diff() != 1) | (index[:-1] == PADDING)
    breaks |= torch.isin(index[1:], torch.tensor(ends[:-1], dtype=index.dtype))
    run_starts = [0, *(breaks.nonzero().flatten() + 1).tolist(), index.numel()]

    def read(start: int, stop: int) -> torch.Tensor:
        parts, place = [], start
        while place < stop:
            after = min(stop, run_starts[bisect.bisect_right(run_starts, place)])
            row = int(index[place])
            if row == PADDING:
                parts.append(torch.zeros(after - place, *first.shape[1:], dtype=first.dtype))
            else:
                number = bisect.bisect_right(ends, row)
                local = row - (ends[number] - sources[number].rows)
                parts.append(sources[number].read(local, local + after - place))
            place = after
        return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts])

    return LazyTensor(shape=(index.numel(), *first.shape[1:]), dtype=first.dtype, read=read)


def _columns(tensor: LazyTensor, rank: int, size: int) -> LazyTensor:
    """Part `rank` of `size` equal parts of dimension 1."""
    shape = (tensor.shape[0], tensor.shape[1] // size, *tensor.shape[2:])
    return replace(tensor, shape=shape, read=lambda start, stop: tensor.read(start, stop).chunk(size, dim=1)[rank])


def _side_by_side(shards: list[LazyTensor]) -> LazyTensor:
    """The inverse of `_columns`."""
    shape = (shards[0].shape[0], sum(shard.shape[1] for shard in shards), *shards[0].shape[2:])
    return replace(
        shards[0],
        shape=shape,
        read=lambda start, stop: torch.cat([shard.read(start, stop) for shard in shards], dim=1),
    )


def _reshaped(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """Another shape of each row."""
    return replace(tensor, shape=shape, read=lambda start, stop: tensor.read(start, stop).reshape(-1, *shape[1:]))


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

    def to_theirs(self, ours: Iterable[tuple[str, LazyTensor]]) -> Iterator[tuple[str, LazyTensor]]:
        """Their (name, tensor) pairs from ours, unsharded."""
        for name, tensor in ours:
            match = self.match_ours(name)
            yield from zip(match.theirs, match.rule.to_theirs([tensor]), strict=True)

    def to_ours(self, theirs: Mapping[str, LazyTensor], rank: int = 0, size: int = 1) -> dict[str, LazyTensor]:
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

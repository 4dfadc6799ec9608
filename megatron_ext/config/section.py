"""Options that are valid once they exist: each field's bound stands in its type, `lr: NonNegative = 5e-5`."""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, Union

from megatron_ext.config.errors import InputError


@dataclasses.dataclass(frozen=True, repr=False)
class Bound:
    """What a value must be: `words` end the line `FIELD VALUE: must be ...`."""

    words: str
    holds: Callable[[Any], bool]

    def __repr__(self) -> str:  # as --help shows the type of an option
        return self.words


def above(low: float) -> Bound:
    """Greater than `low`."""
    return Bound(f"above {low:g}", lambda value: value > low)


def least(low: float) -> Bound:
    """`low` or greater."""
    return Bound(f"at least {low:g}", lambda value: value >= low)


def below(high: float) -> Bound:
    """Less than `high`."""
    return Bound(f"below {high:g}", lambda value: value < high)


def most(high: float) -> Bound:
    """`high` or less."""
    return Bound(f"at most {high:,}" if isinstance(high, int) else f"at most {high:g}", lambda value: value <= high)


Count = Annotated[int, least(1)]
"""How many there are of what cannot be absent."""

Number = Annotated[int, least(0)]
"""How many, or which one, counted from 0."""

Seed = Annotated[int, least(0), most(2**63 - 1)]
"""What every generator of random numbers takes."""

Positive = Annotated[float, above(0)]
NonNegative = Annotated[float, least(0)]

Share = Annotated[float, least(0), most(1)]
"""A part of a whole, or a probability."""

Decay = Annotated[float, least(0), below(1)]
"""What a moving average keeps of itself, or what dropout drops: all of it would leave nothing."""

Name = Annotated[str, Bound("non-empty", lambda value: bool(value.strip()))]
"""A path or a name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Base of frozen dataclasses of options. `section` is the name under which a configuration holds them."""

    section_name: ClassVar[str] = ""

    def __init_subclass__(cls, *, section: str | None = None, **others: Any) -> None:
        """Take the name; a subclass without one keeps its base's."""
        super().__init_subclass__(**others)
        if section is not None:
            cls.section_name = section

    def __post_init__(self) -> None:
        """Raise InputError, one line, for every field that is out of its bounds.

        What fields must be together a section checks in its own `__post_init__`, after this.
        """
        prefix = self.section_name + "." if self.section_name else ""
        faults = [
            f"{prefix}{name} {_shown(value)}: must be {' and '.join(words)}{', or null' * _is_optional(hint)}"
            for name, hint in _hints(type(self)).items()
            if (words := list(dict.fromkeys(_broken(hint, value := getattr(self, name)))))
        ]
        if faults:
            raise InputError("; ".join(faults))


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    hints = typing.get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def _broken(hint: Any, value: Any) -> Iterator[str]:
    """The words of the bounds that a value, or an item of it, is out of.

    In any case a number must be finite, and a value there: YAML reads `lr:` as null, and the parser lets it pass.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        if not _is_optional(hint):
            yield "given"
    elif isinstance(value, float) and not math.isfinite(value):
        yield "a finite number"
    elif origin is Annotated:
        yield from (bound.words for bound in arguments[1:] if not bound.holds(value))
    elif origin in (Union, types.UnionType):
        for kind in (kind for kind in arguments if _is_a(value, kind)):
            yield from _broken(kind, value)
    elif isinstance(value, (list, tuple)) and origin in (list, tuple):
        kinds = arguments if origin is tuple and ... not in arguments else arguments[:1] * len(value)
        for kind, item in zip(kinds, value, strict=True):
            yield from (f"{words} each" for words in _broken(kind, item))


def _is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType) and types.NoneType in typing.get_args(hint)


def _is_a(value: Any, kind: Any) -> bool:
    """Whether `kind` of a union is the one that `value` is of; a whole number may stand for a float."""
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    plain = typing.get_origin(kind) or kind
    return isinstance(plain, type) and isinstance(value, (plain, int) if plain is float else plain)


def _shown(value: Any) -> str:
    """A value in a message: as YAML and the command line write it."""
    if isinstance(value, tuple):
        value = list(value)
    if value is None:
        return "null"
    return repr(value) if isinstance(value, (str, list)) else str(value)

"""Bounds in the types of fields: what is out of them is refused when the object is made, in one line that names it."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config import InputError
from megatron_ext.config.section import (
    Bound,
    Count,
    Decay,
    Name,
    NonNegative,
    Number,
    Positive,
    Section,
    Seed,
    Share,
    above,
    below,
    least,
    most,
)


@dataclass(frozen=True, kw_only=True)
class Sample(Section, section="sample"):
    """One field of every form that sections have."""

    count: Count = 1
    rate: Positive = 1.0
    weight: NonNegative | None = None
    share: Share = 0.5
    pair: tuple[Count, Number] | None = None
    sizes: list[Count] = dataclasses.field(default_factory=list)
    name: Name = "x"
    names: Name | tuple[Name, ...] = ()
    odd: Annotated[int, least(3), Bound("odd", lambda value: value % 2 == 1)] = 3
    choice: Literal["a", "b"] = "a"
    free: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Derived(Sample):
    """A section of the same name with more fields."""

    more: Count = 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "sample.count 0: must be at least 1"),
        ({"rate": 0.0}, "sample.rate 0.0: must be above 0"),
        ({"weight": -0.5}, "sample.weight -0.5: must be at least 0, or null"),
        ({"share": 1.5}, "sample.share 1.5: must be at most 1"),
        ({"pair": (0, -1)}, "sample.pair [0, -1]: must be at least 1 each and at least 0 each, or null"),
        ({"pair": (1, -1)}, "sample.pair [1, -1]: must be at least 0 each, or null"),
        ({"sizes": [4, 0]}, "sample.sizes [4, 0]: must be at least 1 each"),
        ({"name": " "}, "sample.name ' ': must be non-empty"),
        ({"names": ""}, "sample.names '': must be non-empty"),
        ({"names": ("a", "")}, "sample.names ['a', '']: must be non-empty each"),
        ({"odd": 2}, "sample.odd 2: must be at least 3 and odd"),
        ({"count": None}, "sample.count null: must be given"),
        ({"choice": None}, "sample.choice null: must be given"),
        ({"free": float("nan")}, "sample.free nan: must be a finite number"),
        ({"weight": float("inf")}, "sample.weight inf: must be a finite number, or null"),
        ({"count": 0, "share": -1.0}, "sample.count 0: must be at least 1; sample.share -1.0: must be at least 0"),
    ],
)
def test_out_of_bounds(values, message):
    for section in (Sample, Derived):
        with pytest.raises(InputError) as error:
            section(**values)
        assert str(error.value) == message


def test_within_bounds():
    given_values = {"weight": 0, "pair": (1, 0), "sizes": [1, 2], "names": ("a", "b"), "odd": 5, "rate": 2}
    assert Sample(**given_values).pair == (1, 0)
    with pytest.raises(InputError, match=r"^sample\.more 0: "):
        Derived(more=0)


def test_a_change_is_checked_too():
    with pytest.raises(InputError, match=r"^sample\.rate -1\.0: "):
        dataclasses.replace(Sample(), rate=-1.0)


@given(st.floats() | st.integers())
def test_bounds_are_what_their_words_say(value):
    import math

    def is_in(hint) -> bool:
        @dataclass(frozen=True, kw_only=True)
        class One(Section):
            field: hint

        try:
            One(field=value)
        except InputError:
            return False
        return True

    finite = math.isfinite(value)
    assert is_in(Annotated[float, above(2)]) == (finite and value > 2)
    assert is_in(Annotated[float, least(2), below(5)]) == (finite and 2 <= value < 5)
    assert is_in(Annotated[float, most(2)]) == (finite and value <= 2)
    assert is_in(Share) == (finite and 0 <= value <= 1)
    assert is_in(Decay) == (finite and 0 <= value < 1)
    assert is_in(Seed) == (finite and 0 <= value < 2**63)

"""What a filter says of a sample, and what is said of the sample in the end."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

KEPT, DROPPED, UNREADABLE = "kept", "dropped", "unreadable"
"""Verdicts, as they stand in the table."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One filter about one sample."""

    filter: str
    """Name of the filter, and the `reason` in the row of a sample that it drops."""

    score: float
    """What was measured, in the filter's own unit."""

    passed: bool
    """Whether the filter lets the sample pass; a score that is no number never does."""

    detail: str = ""
    """Why not: score and threshold in words; empty when passed."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What becomes of a sample."""

    verdict: str = KEPT
    """KEPT, DROPPED or UNREADABLE."""

    reason: str = ""
    """Name of the filter that dropped it; UNREADABLE for what could not be read; empty when kept."""

    detail: str = ""
    """The same in words, with figures."""


def at_least(filter: str, score: float, minimum: float) -> Judgement:
    """Pass from `minimum` upwards."""
    return within(filter, score, minimum, math.inf)


def at_most(filter: str, score: float, maximum: float) -> Judgement:
    """Pass up to and with `maximum`."""
    return within(filter, score, -math.inf, maximum)


def within(filter: str, score: float, minimum: float, maximum: float) -> Judgement:
    """Pass from `minimum` to `maximum`, both included."""
    if minimum <= score <= maximum:
        return Judgement(filter=filter, score=score, passed=True)
    side, bound = ("above", maximum) if score > maximum else ("below", minimum if score < minimum else math.nan)
    fault = "is no number" if math.isnan(score) else f"{score:.6g} is {side} {bound:.6g}"
    return Judgement(filter=filter, score=score, passed=False, detail=f"{filter} {fault}")


def verdict_of(judgements: Iterable[Judgement]) -> Verdict:
    """KEPT when all pass, else DROPPED by the first that does not; later ones are not asked."""
    failed = next((judgement for judgement in judgements if not judgement.passed), None)
    if failed is None:
        return Verdict()
    return Verdict(verdict=DROPPED, reason=failed.filter, detail=failed.detail)

"""Judgements at, below and above their thresholds."""

import math

import pytest

from megatron_ext.curate import DROPPED, KEPT, at_least, at_most, verdict_of, within


@pytest.mark.parametrize("score, passed", [(5.5, True), (math.nextafter(5.5, 0), False), (math.nan, False)])
def test_a_minimum_is_included(score, passed):
    assert at_least("aesthetic", score, 5.5).passed is passed


@pytest.mark.parametrize("score, passed", [(0.1, True), (math.nextafter(0.1, 1), False), (math.nan, False)])
def test_a_maximum_is_included(score, passed):
    assert at_most("text", score, 0.1).passed is passed


@pytest.mark.parametrize(
    "score, detail", [(0.5, "motion 0.5 is below 1"), (3, "motion 3 is above 2"), (1, ""), (2, "")]
)
def test_both_bounds(score, detail):
    assert within("motion", score, 1, 2).detail == detail


def test_no_number_is_said():
    assert at_least("aesthetic", math.nan, 1).detail == "aesthetic is no number"


def test_the_first_failure_decides_and_the_rest_is_not_asked():
    def judgements():
        yield at_least("resolution", 600, 512)
        yield at_least("aesthetic", 5, 5.5)
        raise AssertionError("asked too much")

    verdict = verdict_of(judgements())
    assert (verdict.verdict, verdict.reason, verdict.detail) == (DROPPED, "aesthetic", "aesthetic 5 is below 5.5")
    assert verdict_of([at_least("resolution", 512, 512)]).verdict == KEPT

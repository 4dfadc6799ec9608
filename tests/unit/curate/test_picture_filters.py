"""Each filter of pictures at its threshold, and how they play together."""

import math

import pytest

from megatron_ext.config import InputError
from megatron_ext.curate import DROPPED, KEPT
from megatron_ext.curate.picture_filters import (
    PictureFiltersConfig,
    Scores,
    judge_aesthetic,
    judge_colour,
    judge_picture,
    judge_resolution,
    judge_text,
    wants_text,
)

FILTERS = PictureFiltersConfig()


def below(value: float) -> float:
    return math.nextafter(value, -math.inf)


def test_the_paper_s_thresholds():
    assert (FILTERS.min_side, FILTERS.min_aesthetic) == (512, 5.5)  # Emu3 paper, section 2.1


@pytest.mark.parametrize("height, width, passed", [(512, 512, True), (511, 9000, False), (9000, 511, False)])
def test_resolution(height, width, passed):
    assert judge_resolution(height, width, FILTERS).passed is passed


def test_scores():
    assert judge_aesthetic(5.5, FILTERS).passed and not judge_aesthetic(below(5.5), FILTERS).passed
    assert judge_text(0.05, FILTERS).passed and not judge_text(0.0500001, FILTERS).passed
    assert judge_colour(3.0, FILTERS).passed and not judge_colour(below(3.0), FILTERS).passed


def scores(**changes) -> Scores:
    return Scores(**{"height": 512, "width": 512, "colour": 9.0, "aesthetic": 5.5, "text": None} | changes)


@pytest.mark.parametrize(
    "changes, verdict, reason, rescued",
    [
        ({}, KEPT, "", False),
        ({"colour": 0.0, "text": 0.9}, KEPT, "", False),  # at the aesthetic score nothing else is asked
        ({"aesthetic": 5.4, "text": 0.05}, KEPT, "", True),
        ({"aesthetic": 5.4, "text": 0.06}, DROPPED, "aesthetic", False),
        ({"aesthetic": 5.4, "colour": 2.9, "text": 0.0}, DROPPED, "aesthetic", False),
        ({"aesthetic": None}, KEPT, "", False),
        ({"height": 511, "aesthetic": 9.0}, DROPPED, "resolution", False),
        ({"aesthetic": math.nan, "text": 0.06}, DROPPED, "aesthetic", False),
    ],
)
def test_rescue(changes, verdict, reason, rescued):
    found, was_rescued = judge_picture(scores(**changes), FILTERS)
    assert (found.verdict, found.reason, was_rescued) == (verdict, reason, rescued)


def test_what_kept_a_picture_from_rescue_is_said():
    found, _ = judge_picture(scores(aesthetic=5.25, colour=1.5), FILTERS)
    assert found.detail == "aesthetic 5.25 is below 5.5, and colour 1.5 is below 3"


def test_require_and_off():
    require, off = (PictureFiltersConfig(text_and_colour=mode) for mode in ("require", "off"))
    assert judge_picture(scores(aesthetic=9.0, text=0.06), require)[0].reason == "text"
    assert judge_picture(scores(aesthetic=None, colour=2.9), require)[0].reason == "colour"
    assert judge_picture(scores(aesthetic=5.4, text=0.0), require)[0].reason == "aesthetic"
    assert judge_picture(scores(aesthetic=5.4, text=0.0), off)[0].reason == "aesthetic"
    assert judge_picture(scores(aesthetic=None, colour=0.0), off)[0].verdict == KEPT


@pytest.mark.parametrize(
    "mode, changes, wanted",
    [
        ("rescue", {}, False),
        ("rescue", {"aesthetic": 5.4}, True),
        ("rescue", {"aesthetic": None}, False),
        ("rescue", {"aesthetic": 5.4, "colour": 2.9}, False),
        ("rescue", {"colour": None}, False),  # too small: nothing was measured
        ("require", {}, True),
        ("require", {"aesthetic": None}, True),
        ("require", {"aesthetic": 5.4}, False),
        ("off", {"aesthetic": 5.4}, False),
    ],
)
def test_text_is_looked_for_where_the_verdict_hangs_on_it(mode, changes, wanted):
    assert wants_text(scores(**changes), PictureFiltersConfig(text_and_colour=mode)) is wanted


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_hash_distance": 9}, "max_hash_distance 9: must be at most 8, or null"),
        ({"max_text": 5.0}, "max_text 5.0: must be at most 1"),
        ({"text_shorter_edge": 10}, "text_shorter_edge 10: must be at least 64"),
        ({"drop_duplicates": False}, "set it to null as well"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(InputError, match=message):
        PictureFiltersConfig(**changes)

"""Which pictures are kept: thresholds, and what is said of a picture whose scores are known."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_ext.config import InputError
from megatron_ext.config.section import NonNegative, Number, Section, Share, least, most
from megatron_ext.curate.duplicates import MAX_DISTANCE
from megatron_ext.curate.verdict import DROPPED, Judgement, Verdict, at_least, at_most, verdict_of


@dataclass(frozen=True, kw_only=True)
class PictureFiltersConfig(Section, section="filters"):
    """Which pictures are kept. Size and aesthetic score are the paper's (section 2.1); the others are ours, because the
    paper says what was filtered and not where the bounds were."""

    min_side: Number = 512
    """Least height and least width in pixels, upright; 0 for any."""

    min_aesthetic: float = 5.5
    """Least score of LAION's aesthetic predictor."""

    text_and_colour: Literal["rescue", "require", "off"] = "rescue"
    """rescue: a picture below the aesthetic score is kept all the same when it has little text and is not monochrome,
    as in the paper; require: every picture must; off: neither is asked."""

    max_text: Share = 0.05
    """Largest share of the area under boxes of text; a line across a picture takes about 0.04."""

    text_shorter_edge: Annotated[int, least(64)] = 512
    """Pixels to which the shorter edge is reduced before text is looked for."""

    min_colour: NonNegative = 3.0
    """Least colour spread, in units of CIE L*a*b*: 3.1 to 39 on 31 colour photographs, up to 1.8 on toned ones."""

    drop_duplicates: bool = True
    """Of pictures with the same file or the same pixels keep one: the largest, of these the largest file, of these the
    first."""

    max_hash_distance: Annotated[Number, most(MAX_DISTANCE)] | None = 4
    """Of pictures whose perceptual hashes differ in at most so many of 64 bits keep one; null keeps all. Recompression
    and scaling move up to 2 bits, brightness up to 6; different photographs differ in 20 and more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_hash_distance is not None and not self.drop_duplicates:
            raise InputError(
                "filters.drop_duplicates is false and filters.max_hash_distance is not null: set it to null as well"
            )


def judge_resolution(height: int, width: int, filters: PictureFiltersConfig) -> Judgement:
    """By the shorter side."""
    return at_least("resolution", min(height, width), filters.min_side)


def judge_aesthetic(score: float, filters: PictureFiltersConfig) -> Judgement:
    """By the predictor's score."""
    return at_least("aesthetic", score, filters.min_aesthetic)


def judge_text(share: float, filters: PictureFiltersConfig) -> Judgement:
    """By the share of the area under text."""
    return at_most("text", share, filters.max_text)


def judge_colour(spread: float, filters: PictureFiltersConfig) -> Judgement:
    """By the colour spread."""
    return at_least("colour", spread, filters.min_colour)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was measured of a picture; None what was not."""

    height: int
    width: int
    colour: float | None = None
    aesthetic: float | None = None
    text: float | None = None


def wants_text(scores: Scores, filters: PictureFiltersConfig) -> bool:
    """Whether the verdict of a picture hangs on its text, which costs more than all the rest."""
    if scores.colour is None or not judge_colour(scores.colour, filters).passed:
        return False
    is_below = scores.aesthetic is not None and not judge_aesthetic(scores.aesthetic, filters).passed
    return {"rescue": is_below, "require": not is_below, "off": False}[filters.text_and_colour]


def judge_picture(scores: Scores, filters: PictureFiltersConfig) -> tuple[Verdict, bool]:
    """The verdict by all filters but duplicates, and whether the picture was rescued. What was not measured passes."""
    resolution = judge_resolution(scores.height, scores.width, filters)
    aesthetic = [] if scores.aesthetic is None else [judge_aesthetic(scores.aesthetic, filters)]
    others = [] if scores.colour is None else [judge_colour(scores.colour, filters)]
    others += [] if scores.text is None else [judge_text(scores.text, filters)]
    asked = [resolution, *aesthetic]
    if filters.text_and_colour == "require":
        asked += others
    verdict = verdict_of(asked)
    if filters.text_and_colour != "rescue" or verdict.reason != "aesthetic":
        return verdict, False
    against = verdict_of(others)
    if not against.reason:
        return Verdict(), True
    return Verdict(verdict=DROPPED, reason=verdict.reason, detail=f"{verdict.detail}, and {against.detail}"), False

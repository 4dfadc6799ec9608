"""What filters say of the scenes of a video: size, length, motion, text; the aesthetic score of its frames.

Shapes: T frames, B of them, H W pixels, C colour channels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.config.section import NonNegative, Number, Section, Share
from megatron_ext.curate.clips import LOOKED_AT_EDGE, aesthetic_frames, looked_at
from megatron_ext.curate.motion import FlowMethod, motion
from megatron_ext.curate.pictures import clip_square
from megatron_ext.curate.scenes import ScenesConfig, Span, split
from megatron_ext.curate.text import text_share
from megatron_ext.curate.verdict import Judgement, at_least, at_most, within
from megatron_ext.media import MediaError, Sample, readable_name
from megatron_ext.media.video import Video

FILTERS = ("resolution", "duration", "motion", "text", "aesthetic")
"""In the order in which they are asked: the cheapest first."""


@dataclass(frozen=True, kw_only=True)
class VideoFiltersConfig(Section, section="filters"):
    """Which clips are kept. Only the aesthetic bound is published (Emu3 paper, section 2.1); the others are ours."""

    min_shorter_edge: Number = 256
    """Pixels of the shorter edge: smaller videos would have to be enlarged to be looked at."""

    min_clip_s: NonNegative = 2.0
    """Seconds: shorter clips are dropped."""

    min_motion: NonNegative = 0.002
    """Mean optical flow from one frame looked at to the next, in shorter edges: 0.5 pixels of 256 in half a second."""

    max_motion: NonNegative = 0.2
    """Likewise at most: 51 pixels of 256, about as far as flow can be followed."""

    flow: FlowMethod = "dis"
    """How optical flow is found: dis, or farneback, which is slower and follows less far."""

    max_text: Share | None = 0.1
    """Share of the picture that text covers, mean of the frames looked at; null does not look for text."""

    min_aesthetic: float = 5.0
    """Aesthetic score of the worst of three frames."""

    measure_all: bool = False
    """Measure also what an earlier filter has dropped already: for histograms to choose bounds from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_motion > self.max_motion:
            raise InputError(
                f"filters.min_motion {self.min_motion} is above filters.max_motion {self.max_motion}: "
                "change one of them"
            )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A scene, and what the filters up to text say of it."""

    span: Span
    judgements: tuple[Judgement, ...]
    """In the order of FILTERS; without `measure_all` none after one that failed."""

    squares_BHWC: np.ndarray | None
    """What the aesthetic score is of, as CLIP looks at it; None where it need not be known."""


@dataclass(frozen=True, kw_only=True)
class Looked:
    """A video, looked through."""

    height: int
    """Pixels, upright."""

    width: int
    """Pixels, upright."""

    frame_rate: float
    """Average frames per second."""

    captions: tuple[str, ...]
    """Of the video as a whole."""

    candidates: tuple[Candidate, ...]


def look_through(sample: Sample, scenes: ScenesConfig, filters: VideoFiltersConfig, clip_side: int | None) -> Looked:
    """Split a video and judge its scenes; `clip_side` is the side of CLIP's squares, None if they are not wanted.

    Raises:
        MediaError: it cannot be read, decoded to its end, or named in UTF-8; its captions are unreadable.
    """
    if readable_name(sample.source) != sample.source:
        raise MediaError("its name is not UTF-8, which shards and datasets hold keys in: rename it")
    with Video(sample.media.open()) as video:
        height, width = video.first_frame.size
        spans = split(video, scenes)
        candidates = []
        for span in spans:
            judgements: list[Judgement] = []
            frames = None
            for frames, judgement in _judged(video, span, (height, width), filters):
                judgements.append(judgement)
                if not judgement.passed and not filters.measure_all:
                    frames = None
                    break
            squares = None
            if frames is not None and clip_side is not None:
                squares = np.stack([clip_square(frame, clip_side) for frame in aesthetic_frames(frames)])
            candidates.append(Candidate(span=span, judgements=tuple(judgements), squares_BHWC=squares))
        return Looked(
            height=height,
            width=width,
            frame_rate=float(video.timeline.frame_rate),
            captions=sample.captions(),
            candidates=tuple(candidates),
        )


def _judged(
    video: Video, span: Span, size: tuple[int, int], filters: VideoFiltersConfig
) -> Iterator[tuple[np.ndarray | None, Judgement]]:
    """(frames that were decoded for it, judgement) of each filter; what is not taken is not computed."""
    yield None, at_least("resolution", min(size), filters.min_shorter_edge)
    yield None, at_least("duration", span.duration_s, filters.min_clip_s)
    frames = looked_at(video, span)
    yield frames, within("motion", motion(frames, filters.flow), filters.min_motion, filters.max_motion)
    if filters.max_text is not None:
        covered = float(np.mean([text_share(frame, LOOKED_AT_EDGE) for frame in frames]))
        yield frames, at_most("text", covered, filters.max_text)


def judge_aesthetics(scores: list[float], filters: VideoFiltersConfig) -> Judgement:
    """The worst of the frames counts; a score that is no number counts as worst."""
    worst = math.nan if any(map(math.isnan, scores)) else min(scores)
    return at_least("aesthetic", worst, filters.min_aesthetic)

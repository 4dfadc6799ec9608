"""Curating one video after the other: what the processes do, and what the program decides between.

A process looks through a video; the program, which holds the aesthetic model, judges its frames; a process then cuts
and encodes the clips that are kept.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import cv2
import numpy as np

from megatron_ext.curate.clip_parts import JudgedClip, JudgedVideo
from megatron_ext.curate.clips import EncodingConfig, clip_file
from megatron_ext.curate.scenes import ScenesConfig
from megatron_ext.curate.verdict import KEPT
from megatron_ext.curate.video_filters import Looked, VideoFiltersConfig, judge_aesthetics, look_through
from megatron_ext.curate.workers import Workers
from megatron_ext.media import MediaError, Sample

Aesthetics = Callable[[np.ndarray], list[float]]
"""RGB uint8 [T, H, W, C] -> score of each frame."""


def prepare() -> None:
    """Ready a process: its parallelism is that of the processes."""
    cv2.setNumThreads(1)


def curate(
    samples: Iterable[Sample],
    workers: Workers,
    scenes: ScenesConfig,
    filters: VideoFiltersConfig,
    encoding: EncodingConfig,
    aesthetics: Aesthetics | None,
) -> Iterator[JudgedVideo]:
    """The videos in their order, judged, their kept clips encoded; videos are worked on ahead of the one given.

    Raises:
        InputError: a process was killed.
    """
    look = functools.partial(_look, scenes=scenes, filters=filters, wants_frames=aesthetics is not None)
    looked = workers.in_order(look, samples)
    judged = (_judge(sample, result, filters, aesthetics) for sample, result in looked)
    for _, video in workers.in_order(functools.partial(_cut, encoding=encoding), judged):
        yield video


def _look(sample: Sample, scenes: ScenesConfig, filters: VideoFiltersConfig, wants_frames: bool) -> Looked | str:
    """What is seen, or why nothing is."""
    try:
        looked = look_through(sample, scenes, filters)
    except MediaError as error:
        return str(error)
    if wants_frames:
        return looked
    return replace(looked, candidates=tuple(replace(item, frames_THWC=None) for item in looked.candidates))


def _judge(
    sample: Sample, looked: Looked | str, filters: VideoFiltersConfig, aesthetics: Aesthetics | None
) -> JudgedVideo:
    if isinstance(looked, str):
        return JudgedVideo(sample=sample, looked=None, fault=looked)
    clips = []
    for candidate in looked.candidates:
        judgements = candidate.judgements
        if aesthetics and candidate.frames_THWC is not None:
            judgements += (judge_aesthetics(aesthetics(candidate.frames_THWC), filters),)
        clips.append(JudgedClip(span=candidate.span, judgements=judgements, content=b"", suffix=""))
    return JudgedVideo(sample=sample, looked=replace(looked, candidates=()), clips=tuple(clips))


def _cut(video: JudgedVideo, encoding: EncodingConfig) -> JudgedVideo:
    """The video with the files of its kept clips."""
    own_suffix = video.sample.source.rpartition(".")[2].lower()
    clips = []
    try:
        for clip in video.clips:
            if clip.verdict.verdict == KEPT:
                content, suffix = clip_file(video.sample.media, clip.span, own_suffix, encoding)
                clip = replace(clip, content=content, suffix=suffix)
            clips.append(clip)
    except MediaError as error:  # the file was whole when it was looked through
        return JudgedVideo(sample=video.sample, looked=None, fault=str(error))
    return replace(video, clips=tuple(clips))

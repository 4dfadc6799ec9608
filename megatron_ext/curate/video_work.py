"""Curating one video after the other: what the processes do, and what the program decides between.

A process looks through a video; the program, which holds the aesthetic model, judges its frames; a process then cuts
and encodes the clips that are kept.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from megatron_ext.curate.clip_parts import JudgedClip, JudgedVideo
from megatron_ext.curate.clips import EncodingConfig, clip_file
from megatron_ext.curate.picture_rows import Rater
from megatron_ext.curate.pictures import call
from megatron_ext.curate.scenes import ScenesConfig
from megatron_ext.curate.verdict import KEPT
from megatron_ext.curate.video_filters import Looked, VideoFiltersConfig, judge_aesthetics, look_through
from megatron_ext.media import Fault, MediaError, Sample
from megatron_ext.media.members import media_suffix
from megatron_ext.media.workers import WorkerPool

Item = TypeVar("Item")
Result = TypeVar("Result")


class VideoCurator:
    """Processes that look through videos and cut them. Use it as a context."""

    def __init__(
        self,
        scenes: ScenesConfig,
        filters: VideoFiltersConfig,
        encoding: EncodingConfig,
        rater: Rater | None,
        *,
        workers: int,
        timeout_s: float = 0.0,
    ) -> None:
        """`rater` None: clips have no aesthetic score. `workers` processes decode and encode, a video for `timeout_s`
        each time at most (0: no limit); 0 do it in this one."""
        self._scenes = scenes
        self._filters = filters
        self._encoding = encoding
        self._rater = rater
        self._pool: WorkerPool = WorkerPool(call, workers, timeout_s=timeout_s)

    def __enter__(self) -> "VideoCurator":
        self._pool.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.__exit__(*error)

    def videos(self, entries: Iterable[Sample | Fault]) -> Iterator[JudgedVideo]:
        """What becomes of each, in order, with the files of kept clips; later ones are worked on ahead."""
        side = self._rater.side if self._rater else None
        look = functools.partial(_look, scenes=self._scenes, filters=self._filters, clip_side=side)
        judged = (self._judged(entry, result) for entry, result in self._each(look, entries))
        for video, result in self._each(functools.partial(_cut, encoding=self._encoding), judged):
            # Cutting may fail where looking did not: the file was changed, or its processes died.
            yield _unreadable(video.entry, result) if isinstance(result, MediaError) else result

    def _each(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result | MediaError]]:
        """(item, what a process made of it)."""
        begun: deque[Item] = deque()

        def tasks() -> Iterator[Callable[[], Result]]:
            for item in items:
                begun.append(item)
                yield functools.partial(function, item)

        for result in self._pool.map(tasks()):
            yield begun.popleft(), result

    def _judged(self, entry: Sample | Fault, looked: Looked | MediaError) -> JudgedVideo:
        if isinstance(looked, MediaError):
            return _unreadable(entry, looked)
        clips = []
        for candidate in looked.candidates:
            judgements = candidate.judgements
            if self._rater and candidate.squares_BHWC is not None:
                scores = self._rater.rate(candidate.squares_BHWC).tolist()
                judgements += (judge_aesthetics(scores, self._filters),)
            clips.append(JudgedClip(span=candidate.span, judgements=judgements, content=b"", suffix=""))
        return JudgedVideo(entry=entry, looked=replace(looked, candidates=()), clips=tuple(clips))


def _unreadable(entry: Sample | Fault, error: MediaError) -> JudgedVideo:
    return JudgedVideo(entry=entry, looked=None, fault=str(error))


def _look(entry: Sample | Fault, scenes: ScenesConfig, filters: VideoFiltersConfig, clip_side: int | None) -> Looked:
    if isinstance(entry, Fault):
        raise MediaError(entry.reason)
    return look_through(entry, scenes, filters, clip_side)


def _cut(video: JudgedVideo, encoding: EncodingConfig) -> JudgedVideo:
    """The video with the files of its kept clips."""
    if video.looked is None:
        return video
    media = video.entry.media
    own_suffix = media_suffix("video", video.entry.source, str(media.path))
    clips = []
    for clip in video.clips:
        if clip.verdict.verdict == KEPT:
            content, suffix = clip_file(media, clip.span, own_suffix, encoding)
            clip = replace(clip, content=content, suffix=suffix)
        clips.append(clip)
    return replace(video, clips=tuple(clips))

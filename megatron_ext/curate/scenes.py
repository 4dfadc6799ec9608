"""Where the scenes of a video begin: PySceneDetect's detectors of cuts and of fades (Emu3 paper, section 2.1).

Only this module imports `scenedetect`. Shapes: H W pixels, C colour channels.
"""

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import scenedetect

from megatron_ext.config.section import Count, NonNegative, Positive, Section
from megatron_ext.curate.spans import cut_evenly
from megatron_ext.media import MediaError
from megatron_ext.media.frame import CONVERTING_THREADS
from megatron_ext.media.video import CLOCK_SLACK, Video


@dataclass(frozen=True, kw_only=True)
class ScenesConfig(Section, section="scenes"):
    """How a video is split. The paper's settings are unpublished; the thresholds are PySceneDetect's own."""

    content_threshold: Positive = 27.0
    """Mean change of hue, saturation and brightness (0..255) from frame to frame that is a cut."""

    fade_threshold: Positive = 12.0
    """Mean value (0..255) of a frame that has faded to black; the cut is in the middle of the black."""

    min_scene_s: NonNegative = 0.6
    """Seconds: a cut this close to the one before is none, so that a flash is one cut."""

    max_clip_s: Positive = 20.0
    """Seconds: a scene of this length or more is cut into equal clips of at least half of it."""

    shorter_edge: Count = 144
    """Pixels of the shorter edge at which frames are compared."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of a video that may become a clip."""

    number: int
    """Place among those of the video."""

    first_stamp: int
    """Time stamp of its first frame."""

    end_stamp: int
    """Time stamp at which its last frame is over: that of the frame after it, where there is one."""

    start_s: float
    """Seconds from the video's first frame to its own."""

    end_s: float
    """Seconds at which its last frame is over."""

    num_frames: int
    """Frames in it."""

    is_whole: bool
    """Whether it is all of the video."""

    @property
    def duration_s(self) -> float:
        """Seconds that its frames are shown."""
        return self.end_s - self.start_s


def find_cuts(frames_HWC: Iterable[np.ndarray], frame_rate: Fraction, scenes: ScenesConfig) -> list[int]:
    """Numbers of the frames with which a scene begins, rising, without the first. Frames are BGR uint8, all of one
    size."""
    shortest = round(scenes.min_scene_s * frame_rate)
    detectors = (
        scenedetect.ContentDetector(threshold=scenes.content_threshold, min_scene_len=shortest),
        scenedetect.ThresholdDetector(threshold=scenes.fade_threshold, min_scene_len=shortest),
    )
    cuts: set[int] = set()
    for number, frame_HWC in enumerate(frames_HWC):
        # Detectors count frames; what times these have is the caller's knowledge.
        time = scenedetect.FrameTimecode(number, fps=frame_rate)
        for detector in detectors:
            cuts.update(cut.frame_num for cut in detector.process_frame(time, frame_HWC))
    return sorted(cuts - {0})


def split(video: Video, scenes: ScenesConfig) -> list[Span]:
    """The scenes of a video, long ones in equal parts; together they are all of its frames.

    Raises:
        MediaError: the video cannot be read to its end, or has no frame.
    """
    stamps: list[int] = []
    sizes: list[tuple[int, int]] = []

    def small_frames() -> Iterable[np.ndarray]:
        for frame in video.frames():
            if not sizes:
                stored = frame.decoded.height, frame.decoded.width  # nothing here depends on how it is turned
                scale = min(1.0, scenes.shorter_edge / min(stored))
                sizes.append((round(stored[0] * scale), round(stored[1] * scale)))
            height, width = sizes[0]  # of all frames, should the size change within the video
            stamps.append(frame.stamp)
            how = {"width": width, "height": height, "interpolation": "AREA", "threads": CONVERTING_THREADS}
            yield frame.decoded.to_ndarray(format="bgr24", **how)

    timeline = video.timeline
    cuts = find_cuts(small_frames(), timeline.frame_rate, scenes)
    if not stamps:
        raise MediaError("no frame")
    stamps.append(stamps[-1] + max(1, round(1 / (timeline.frame_rate * timeline.unit))))
    seconds = [float((stamp - stamps[0]) * timeline.unit) for stamp in stamps]
    edges = [0, *cuts, len(stamps) - 1]
    parts = [part for first, end in itertools.pairwise(edges) for part in _parts(seconds, first, end, scenes)]
    return [
        Span(
            number=number,
            first_stamp=stamps[first],
            end_stamp=stamps[end],
            start_s=seconds[first],
            end_s=seconds[end],
            num_frames=end - first,
            is_whole=end - first == len(stamps) - 1,
        )
        for number, (first, end) in enumerate(parts)
    ]


def _parts(seconds: Sequence[float], first: int, end: int, scenes: ScenesConfig) -> Iterator[tuple[int, int]]:
    """The scene of frames `first` to before `end`, whole or cut evenly between frames."""
    pieces = cut_evenly(seconds[end] - seconds[first], scenes.max_clip_s)
    edges = [bisect.bisect_left(seconds, seconds[first] + start - CLOCK_SLACK, first, end) for start, _ in pieces]
    for begin, over in itertools.pairwise([*edges, end]):
        if begin < over:
            yield begin, over

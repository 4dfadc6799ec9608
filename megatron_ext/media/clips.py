"""Safe decoding of clips from untrusted bytes, sampled at a constant frame rate.

Shapes: T frames, H W pixels, C colour channels.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.media.errors import MediaError
from megatron_ext.media.frame import Frame
from megatron_ext.media.video import CLOCK_SLACK, Video


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames at a constant rate."""

    frames_THWC: np.ndarray
    """Uint8."""

    frame_rate_mhz: int
    """Frames per 1000 seconds."""

    duration_ms: int
    """Milliseconds that the frames cover: frames / rate."""


def decode_clip(
    data: bytes,
    *,
    frame_rate: float | None,
    max_frames: int,
    multiple: int,
    resize: Callable[[np.ndarray], np.ndarray],
) -> Clip:
    """The clip from its start, at `frame_rate` frames per second (None: its own average rate).

    The frame at time t is the one on show then. `resize` is applied to each frame as it is decoded, so that memory
    holds small frames only. The end is cut to a multiple of `multiple` frames, at most `max_frames`; time stamps of
    an untrusted file can claim years.

    Raises:
        MediaError: not a readable clip, no video in it, fewer than `multiple` frames, or frames of several sizes.
    """
    with Video(io.BytesIO(data)) as video:
        timeline = video.timeline
        rate = frame_rate or float(timeline.frame_rate)
        shown = ((float(frame.stamp * timeline.unit), frame) for frame in video.frames())
        sampled = _sample(shown, rate, float(1 / timeline.frame_rate), max_frames)
        frames = [resize(frame.pixels()) for frame in sampled]
    count = len(frames) // multiple * multiple
    if not count:
        raise MediaError(f"{len(frames)} frames at {rate:g} a second: at least {multiple} are needed")
    if len({frame.shape for frame in frames[:count]}) > 1:
        raise MediaError("the picture size changes within the clip")
    return Clip(
        frames_THWC=np.stack(frames[:count]),
        frame_rate_mhz=round(rate * 1000),
        duration_ms=round(1000 * count / rate),
    )


def decode_frames(data: bytes, numbers: Sequence[int]) -> np.ndarray:
    """Frames of the clip by their numbers in order of time, as uint8 [T, H, W, C] at their size.

    `numbers` rise and may repeat. Decoding begins at the last key frame before the first of them.

    Raises:
        MediaError: not a readable clip, no such frame, or frames of several sizes.
    """
    with Video(io.BytesIO(data)) as video:
        stamps = video.timeline.stamps
        number_at = {int(stamps[number]): number for number in numbers if number < len(stamps)}
        found = {}
        for frame in video.frames(min(number_at)) if number_at else ():
            if frame.stamp in number_at:
                found[number_at[frame.stamp]] = frame.pixels()
                if len(found) == len(number_at):
                    break
    missing = [number for number in numbers if number not in found]
    if missing:
        raise MediaError(f"the clip ends before its frame {missing[0]}")
    if len({frame.shape for frame in found.values()}) > 1:
        raise MediaError("the picture size changes within the clip")
    return np.stack([found[number] for number in numbers])


def _sample(shown: Iterator[tuple[float, Frame]], rate: float, last_seconds: float, max_frames: int) -> Iterator[Frame]:
    """Of frames with the times at which they appear, those on show at 0, 1/rate, 2/rate ... from the first one on."""
    taken, start, current = 0, None, None
    for time, frame in shown:
        start = time if start is None else start
        while current is not None and taken / rate < time - start - CLOCK_SLACK:
            yield current
            taken += 1
            if taken == max_frames:
                return
        current, current_time = frame, time
    end = None if current is None else current_time + last_seconds - start - CLOCK_SLACK
    while end is not None and taken != max_frames and taken / rate < end:
        yield current
        taken += 1

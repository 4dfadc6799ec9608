"""Safe decoding of clips from untrusted bytes, sampled at a constant frame rate.

Shapes: T frames, H W pixels, C colour channels.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import av
import numpy as np

from megatron_ext.config import reason_of
from megatron_ext.media.errors import MediaError
from megatron_ext.media.pictures import MAX_PIXELS

Frame = TypeVar("Frame")

MAX_FRAME_RATE = 1000.0  # a container that claims more has no usable clock


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
    """The clip's first video stream from its start, at `frame_rate` frames per second (None: its own average rate).

    The frame at time t is the one on show then. `resize` is applied to each frame as it is decoded, so that memory
    holds small frames only. The end is cut to a multiple of `multiple` frames, at most `max_frames`; time stamps of
    an untrusted file can claim years.

    Raises:
        MediaError: not a readable clip, no video stream, fewer than `multiple` frames, or frames of several sizes.
    """
    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise MediaError("no video stream")
            stream = container.streams.video[0]
            own_rate = float(stream.average_rate or stream.guessed_rate or 0)
            rate = frame_rate or own_rate
            if not 0 < rate <= MAX_FRAME_RATE:
                raise MediaError(f"frame rate {rate:g} is not usable; give frame_rate")
            shown = ((frame.time, frame) for frame in container.decode(stream))
            frames = [resize(_upright_rgb(frame)) for frame in _sample(shown, rate, 1 / (own_rate or rate), max_frames)]
    except (MediaError, MemoryError):
        raise
    except Exception as error:  # FFmpeg's errors are many classes, and PyAV adds ValueError and OSError
        raise MediaError(f"not a readable clip ({reason_of(error)})") from None
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
    """Frames of the clip's first video stream by their numbers in order of time, as uint8 [T, H, W, C] at their size.

    `numbers` rise and may repeat. Decoding begins at the last key frame before the first of them.

    Raises:
        MediaError: not a readable clip, no such frame, or frames of several sizes.
    """
    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise MediaError("no video stream")
            stream = container.streams.video[0]
            found = _frames_at(container, stream, set(numbers))
    except (MediaError, MemoryError):
        raise
    except Exception as error:  # as in decode_clip
        raise MediaError(f"not a readable clip ({reason_of(error)})") from None
    missing = [number for number in numbers if number not in found]
    if missing:
        raise MediaError(f"the clip ends before its frame {missing[0]}")
    if len({frame.shape for frame in found.values()}) > 1:
        raise MediaError("the picture size changes within the clip")
    return np.stack([found[number] for number in numbers])


def _frames_at(
    container: av.container.InputContainer, stream: av.VideoStream, wanted: set[int]
) -> dict[int, np.ndarray]:
    """Frame number -> upright RGB, of those in `wanted` that the clip has."""
    packets = [(p.pts, p.dts, p.is_keyframe) for p in container.demux(stream) if p.size and not p.is_discard]
    stamps = sorted(pts for pts, _, _ in packets if pts is not None)
    if len(stamps) < len(packets):
        raise MediaError("a frame has no time stamp")
    first, found = min(wanted), {}
    if first >= len(stamps):
        return found
    # Some containers are sought by the time of decoding, which is never after that of showing.
    starts = [pts if dts is None else dts for pts, dts, is_key in packets if is_key and pts <= stamps[first]]
    container.seek(max(starts, default=0), stream=stream, backward=True)
    number_at = {stamps[number]: number for number in wanted if number < len(stamps)}
    for frame in container.decode(stream):
        if frame.pts in number_at:
            found[number_at[frame.pts]] = _upright_rgb(frame)
            if len(found) == len(number_at):
                break
    return found


def _sample(
    shown: Iterator[tuple[float | None, Frame]], rate: float, last_seconds: float, max_frames: int
) -> Iterator[Frame]:
    """Of frames with the times at which they appear, those on show at 0, 1/rate, 2/rate ... from the first one on."""
    taken, start, current = 0, None, None
    for time, frame in shown:
        if time is None:
            raise MediaError("a frame has no time stamp")
        start = time if start is None else start
        # Half a millisecond of slack: time stamps are rounded to the container's clock.
        while current is not None and taken / rate < time - start - 5e-4:
            yield current
            taken += 1
            if taken == max_frames:
                return
        current, current_time = frame, time
    while current is not None and taken != max_frames and taken / rate < current_time + last_seconds - start - 5e-4:
        yield current
        taken += 1


def _upright_rgb(frame: av.VideoFrame) -> np.ndarray:
    if frame.width * frame.height > MAX_PIXELS:
        raise MediaError(f"{frame.height}x{frame.width} pixels: more than {MAX_PIXELS}")
    return np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90) % 4)

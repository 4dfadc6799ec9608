"""One video, read frame by frame from untrusted bytes: a film of any length needs the memory of a frame.

Time stamps (`stamp`) are integers in the stream's own units, so that a frame is named exactly; seconds count from the
first frame. Shapes: H W pixels, C colour channels.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import TracebackType

import av
import numpy as np

from megatron_ext.config import reason_of
from megatron_ext.media import MediaError
from megatron_ext.media.clips import MAX_FRAME_RATE
from megatron_ext.media.pictures import MAX_PIXELS
from megatron_ext.media.samples import Extent


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """When the frames of a video are shown."""

    stamps: np.ndarray
    """Int64, rising: the time stamp of each frame."""

    unit: Fraction
    """Seconds of one time stamp."""

    frame_s: float
    """Seconds that the last frame is shown."""

    @property
    def duration_s(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return self.seconds(int(self.stamps[-1])) + self.frame_s

    def seconds(self, stamp: int) -> float:
        """Seconds from the first frame to the one of `stamp`."""
        return float((stamp - int(self.stamps[0])) * self.unit)

    def shown_at(self, seconds: Sequence[float]) -> list[int]:
        """Stamps of the frames on show at these times, each once."""
        # Half a millisecond of slack: time stamps are rounded to the container's clock.
        wanted = np.asarray(seconds) + 5e-4
        at = (self.stamps - self.stamps[0]) * float(self.unit)
        numbers = np.maximum(np.searchsorted(at, wanted, side="right") - 1, 0)
        return [int(self.stamps[number]) for number in np.unique(numbers)]


class Video:
    """The first video stream of a file. A context manager; reading in it raises MediaError for whatever is wrong."""

    def __init__(self, extent: Extent) -> None:
        self._file = extent.open()
        try:
            with _faults():
                self._container = av.open(self._file)
                if not self._container.streams.video:
                    raise MediaError("no video stream")
        except BaseException:
            self._file.close()
            raise
        self._stream = self._container.streams.video[0]
        self._stream.codec_context.thread_count = 1  # many videos are read at once

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._container.close()
        self._file.close()

    @property
    def unit(self) -> Fraction:
        """Seconds of one time stamp."""
        return Fraction(self._stream.time_base)

    @functools.cached_property
    def frame_rate(self) -> Fraction:
        """Average frames per second, as the file says.

        Raises:
            MediaError: it says nothing, or nothing possible.
        """
        rate = Fraction(self._stream.average_rate or self._stream.guessed_rate or 0)
        if not 0 < rate <= MAX_FRAME_RATE:
            raise MediaError(f"frame rate {float(rate):g} is not usable")
        return rate

    @functools.cached_property
    def upright_size(self) -> tuple[int, int]:
        """Height and width in pixels as the first frame is shown.

        Raises:
            MediaError: no frame can be decoded.
        """
        frame = next(self.frames(), None)
        if frame is None:
            raise MediaError("no frame")
        lies = round(frame.rotation / 90) % 2
        return (frame.width, frame.height) if lies else (frame.height, frame.width)

    @functools.cached_property
    def timeline(self) -> Timeline:
        """All frames' time stamps, read without decoding.

        Raises:
            MediaError: not a readable video, no frame, or one without a time stamp.
        """
        with _faults():
            self._rewind()
            packets = (packet for packet in self._container.demux(self._stream))
            stamps = [packet.pts for packet in packets if packet.size and not packet.is_discard]
        if None in stamps:
            raise MediaError("a frame has no time stamp")
        if not stamps:
            raise MediaError("no frame")
        return Timeline(stamps=np.array(sorted(stamps), np.int64), unit=self.unit, frame_s=float(1 / self.frame_rate))

    def frames(self, first: int | None = None) -> Iterator[av.VideoFrame]:
        """The frames in order of time, from the one of stamp `first` (None: from the start), each time once.

        Raises:
            MediaError: not a readable video, a frame without a time stamp, or a frame too large to be honest.
        """
        with _faults():
            self._rewind(first)
            last = None
            for frame in self._container.decode(self._stream):
                if frame.pts is None:
                    raise MediaError("a frame has no time stamp")
                if frame.width * frame.height > MAX_PIXELS:
                    raise MediaError(f"{frame.height}x{frame.width} pixels: more than {MAX_PIXELS}")
                # Some files hold two frames of one time, or go back in it.
                if (first is None or frame.pts >= first) and (last is None or frame.pts > last):
                    last = frame.pts
                    yield frame

    def frames_at(self, stamps: Sequence[int]) -> Iterator[av.VideoFrame]:
        """For each of the rising `stamps` its frame; where that one is lost, the next. Fewer, where the video ends."""
        wanted = iter(stamps)
        stamp = next(wanted, None)
        if stamp is None:
            return
        for frame in self.frames(stamp):
            if frame.pts >= stamp:
                yield frame
                stamp = next((later for later in wanted if later > frame.pts), None)
                if stamp is None:
                    return

    def _rewind(self, first: int | None = None) -> None:
        """Stand at a key frame from which the frame `first` can be decoded."""
        if first is not None:
            self._container.seek(first, stream=self._stream, backward=True)
            # A stream is sought by the time of decoding, and by an index that may be wrong.
            if self._starts_by(first):
                self._container.seek(first, stream=self._stream, backward=True)
                return
        self._container.seek(self._stream.start_time or 0, stream=self._stream, backward=True)

    def _starts_by(self, stamp: int) -> bool:
        first = next((packet for packet in self._container.demux(self._stream) if packet.size), None)
        return first is not None and first.is_keyframe and first.pts is not None and first.pts <= stamp


def upright(frame: av.VideoFrame, shorter_edge: int | None = None) -> np.ndarray:
    """A frame as RGB uint8 [H, W, C], turned as it is to be shown; reduced, where it is larger, to `shorter_edge`."""
    height, width = frame.height, frame.width
    if shorter_edge is not None and min(height, width) > shorter_edge:
        scale = shorter_edge / min(height, width)
        height, width = round(height * scale), round(width * scale)
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA")
    return np.ascontiguousarray(np.rot90(pixels, k=round(frame.rotation / 90) % 4))


def cut_evenly(duration_s: float, whole_under_s: float) -> list[tuple[float, float]]:
    """(start, end) in seconds of equal pieces: the whole where it is shorter than `whole_under_s`, else as few as are
    shorter; each is then at least half as long."""
    count = int(duration_s // whole_under_s) + 1
    edges = [duration_s * number / count for number in range(count + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def evenly_spaced(start_s: float, end_s: float, count: int) -> list[float]:
    """The middles of `count` equal parts of a span of time, in seconds."""
    return [start_s + (number + 0.5) / count * (end_s - start_s) for number in range(count)]


@contextlib.contextmanager
def _faults() -> Iterator[None]:
    """FFmpeg's errors are many classes, and PyAV adds ValueError and OSError: all say that the video is unreadable."""
    try:
        yield
    except (MediaError, MemoryError):
        raise
    except Exception as error:
        raise MediaError(f"not a readable video ({reason_of(error)})") from None

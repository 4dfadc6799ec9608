"""One video, opened: which stream of the container it is, which frames it has, when they are shown and how.

All that reads videos reads them here: clips, headers, single frames, curation. What an untrusted container claims is
checked where it can be:
- The video is the first video stream that is no attached picture: cover art may stand before it.
- Frames come in the order in which they are shown, and their times rise. Where a container has no times of showing, as
  AVI, the n-th frame that is decoded has the n-th time.
- Frames that an edit list cuts off are not there.
- The frame rate is the file's where the times of its frames agree, else theirs.

Time stamps (`stamp`) are integers in units of the video's own, so that a frame is named exactly; seconds count from the
first frame.
"""

import functools
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import TracebackType
from typing import BinaryIO

import av
import numpy as np
from av.stream import Disposition

from megatron_ext.media.errors import MediaError
from megatron_ext.media.frame import Frame, faults

MAX_FRAME_RATE = 1000
"""Frames per second; a container that claims more has no usable clock."""

RATE_TOLERANCE = Fraction(1, 50)
"""By how much of itself the rate that a container claims may miss that of its frames' times."""

MAX_PIXEL_ASPECT = 16
"""Sides of a pixel, the longer over the shorter; who claims more is damaged."""

SQUARE = Fraction(1, 100)
"""Pixels that miss a square by less are square: encoders write 405:404 where they rounded a size."""

CLOCK_SLACK = 5e-4
"""Seconds by which a frame counts as on show early: time stamps are rounded to the container's clock."""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """When the frames of a video are shown."""

    stamps: np.ndarray
    """Int64, rising: the time stamp of each frame."""

    unit: Fraction
    """Seconds of one time stamp."""

    frame_rate: Fraction
    """Frames per second on average; the last one is shown for one over that."""

    is_carried: bool
    """Whether decoded frames carry these stamps; else the n-th of them has the n-th."""

    is_cut: bool
    """Whether the file holds frames that are not shown."""

    @property
    def duration_s(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return self.seconds(int(self.stamps[-1])) + float(1 / self.frame_rate)

    def seconds(self, stamp: int) -> float:
        """Seconds from the first frame to the one of `stamp`."""
        return float((stamp - int(self.stamps[0])) * self.unit)

    def shown_at(self, seconds: Sequence[float]) -> list[int]:
        """Stamps of the frames on show at these times, each once."""
        wanted = np.asarray(seconds) + CLOCK_SLACK
        at = (self.stamps - self.stamps[0]) * float(self.unit)
        numbers = np.maximum(np.searchsorted(at, wanted, side="right") - 1, 0)
        return [int(self.stamps[number]) for number in np.unique(numbers)]


class Video:
    """The video of a file. A context manager that closes the file; reading raises MediaError for whatever is wrong."""

    def __init__(self, file: BinaryIO) -> None:
        """Read the container's header.

        Raises:
            MediaError: not a readable clip, or no video in it.
        """
        self._file = file
        self._first_dts: int | None = None
        try:
            with faults():
                self._container = av.open(file)
                self._stream = _video_stream(self._container)
                self._stream.codec_context.thread_count = 1  # many videos are read at once
                self._pixel_aspect = _pixel_aspect(self._stream.sample_aspect_ratio)
        except BaseException:
            file.close()
            raise

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._container.close()
        self._file.close()

    @property
    def codec(self) -> str:
        """FFmpeg's name of the codec."""
        return self._stream.codec_context.codec.canonical_name

    @functools.cached_property
    def timeline(self) -> Timeline:
        """When all frames are shown, read without decoding.

        Raises:
            MediaError: not a readable clip, no frame, or no usable clock.
        """
        with faults():
            self._rewind()
            packets = [(packet.pts, packet.is_discard) for packet in self._packets() if packet.size]
        stamps = [stamp for stamp, is_cut in packets if not is_cut]
        if not stamps:
            raise MediaError("no frame")
        if None in stamps:
            raise MediaError("a frame has no time stamp")
        # Where frames are stored in another order than shown, stamps in the order of storing say nothing of showing.
        is_carried = not self._stream.codec_context.has_b_frames or any(a >= b for a, b in itertools.pairwise(stamps))
        shown, unit = np.unique(np.array(stamps, np.int64)), Fraction(self._stream.time_base)
        return Timeline(
            stamps=shown,
            unit=unit,
            frame_rate=_average_rate(self._claimed_rate, shown, unit),
            is_carried=is_carried,
            is_cut=len(stamps) < len(packets),
        )

    @functools.cached_property
    def summary(self) -> tuple[int, Fraction, bool]:
        """(frames, their average rate, whether a reader that counts all frames in the file counts as here).

        MP4 says so in its header, which spares reading the whole file; other containers say nothing, or too much.

        Raises:
            MediaError: as `timeline`.
        """
        is_first = self._container.streams.video[0].index == self._stream.index
        with faults():
            entries = list(self._stream.index_entries) if "mov" in self._container.format.name else []
        if entries and self._stream.frames and self._claimed_rate:
            end = self._file.seek(0, io.SEEK_END)
            shown = sum(1 for e in entries if e.size and not e.is_discard and e.pos + e.size <= end)
            return shown, self._claimed_rate, is_first and shown == self._stream.frames
        timeline = self.timeline
        return len(timeline.stamps), timeline.frame_rate, is_first and timeline.is_carried and not timeline.is_cut

    @functools.cached_property
    def first_frame(self) -> Frame:
        """The first frame that is shown, found without reading the rest; its stamp is what the file says.

        Raises:
            MediaError: not a readable clip, or no frame in it.
        """
        with faults():
            self._rewind()
            decoded = next(self._decoded(), None)
            if decoded is None:
                raise MediaError("no frame")
            return Frame(decoded, decoded.pts or 0, self._pixel_aspect)

    def frames(self, first: int | None = None) -> Iterator[Frame]:
        """The frames in the order in which they are shown, from the one of stamp `first` (None: from the start).

        Raises:
            MediaError: not a readable clip, frames whose times go back, or one too large to be honest.
        """
        timeline = self.timeline
        with faults():
            self._rewind(first if timeline.is_carried else None)
            decoded = self._decoded()
            stamped = (
                ((frame.pts, frame) for frame in decoded)
                if timeline.is_carried
                else zip(timeline.stamps.tolist(), decoded, strict=False)
            )
            last = None
            for stamp, frame in stamped:
                if stamp is None or (last is not None and stamp < last):
                    raise MediaError("the time stamps of its frames go back")
                # Some files hold two frames of one time.
                if stamp != last and (first is None or stamp >= first):
                    last = stamp
                    yield Frame(frame, stamp, self._pixel_aspect)

    def frames_at(self, stamps: Sequence[int]) -> Iterator[Frame]:
        """For each of the rising `stamps` its frame; where that one is lost, the next. Fewer, where the video ends."""
        wanted = iter(stamps)
        stamp = next(wanted, None)
        if stamp is None:
            return
        for frame in self.frames(stamp):
            if frame.stamp >= stamp:
                yield frame
                stamp = next((later for later in wanted if later > frame.stamp), None)
                if stamp is None:
                    return

    @property
    def _claimed_rate(self) -> Fraction | None:
        rate = Fraction(self._stream.average_rate or self._stream.guessed_rate or 0)
        return rate if 0 < rate <= MAX_FRAME_RATE else None

    def _rewind(self, first: int | None = None) -> None:
        """Stand at a key frame from which the frame `first` can be decoded."""
        if first is not None:
            self._container.seek(first, stream=self._stream, backward=True)
            # A stream is sought by the time of decoding, and by an index that may be wrong.
            if self._starts_by(first):
                self._container.seek(first, stream=self._stream, backward=True)
                return
        if self._first_dts is not None:  # else it stands there since it was opened
            self._container.seek(self._first_dts, stream=self._stream, backward=True)

    def _packets(self) -> Iterator[av.Packet]:
        """The packets from here on; the last are empty, and let a decoder give what it still holds."""
        for packet in self._container.demux(self._stream):
            if self._first_dts is None:
                self._first_dts = packet.dts or 0
            yield packet

    def _decoded(self) -> Iterator[av.VideoFrame]:
        return (frame for packet in self._packets() for frame in packet.decode())

    def _starts_by(self, stamp: int) -> bool:
        first = next((packet for packet in self._packets() if packet.size), None)
        return first is not None and first.is_keyframe and first.pts is not None and first.pts <= stamp


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    for stream in container.streams.video:
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic:
            return stream
    raise MediaError("no video stream")


def _pixel_aspect(claimed: Fraction | None) -> Fraction:
    """Width of a pixel over its height; nothing said means square."""
    if not claimed or abs(claimed - 1) < SQUARE:
        return Fraction(1)
    if not Fraction(1, MAX_PIXEL_ASPECT) <= claimed <= MAX_PIXEL_ASPECT:
        raise MediaError(f"pixels of {claimed.numerator}:{claimed.denominator}: no such clip is shown")
    return claimed


def _average_rate(claimed: Fraction | None, stamps: np.ndarray, unit: Fraction) -> Fraction:
    """Frames per second: what is claimed, where the average or the usual time between frames agrees, else that."""
    measured = claimed
    if len(stamps) > 1:
        span, usual = int(stamps[-1] - stamps[0]), int(np.median(np.diff(stamps)))
        measured = (len(stamps) - 1) / (span * unit)
        # A time between frames is rounded by up to one unit of the clock.
        for rate, units in ((measured, span), (1 / (usual * unit), usual)):
            if claimed and abs(claimed - rate) <= rate * (RATE_TOLERANCE + Fraction(1, units)):
                return claimed
    if measured is None or not 0 < measured <= MAX_FRAME_RATE:
        raise MediaError(f"frame rate {float(measured or 0):g} is not usable")
    return measured

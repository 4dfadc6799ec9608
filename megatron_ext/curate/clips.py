"""Clips of a video: the frames that filters look at, and the clip as a file of its own.

Shapes: T frames, H W pixels, C colour channels.
"""

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

import av
import numpy as np
from av.video.reformatter import Colorspace

from megatron_ext.config import InputError
from megatron_ext.config.section import Number, Section, most
from megatron_ext.curate.scenes import Span
from megatron_ext.curate.spans import evenly_spaced
from megatron_ext.media import MediaError
from megatron_ext.media.frame import CONVERTING_THREADS, Frame, Orientation, faults
from megatron_ext.media.samples import Extent
from megatron_ext.media.video import Video

LOOKED_AT_EDGE = 256
"""Pixels of the shorter edge of the frames that are looked at (Emu3 paper, section 2.1)."""

LOOKED_AT_RATE = 2.0
"""Frames per second that are looked at (the same)."""

AESTHETIC_FRAMES = 3
"""Frames of a clip whose aesthetic score counts, by the worst of them (the same); their places are unpublished."""


@dataclass(frozen=True, kw_only=True)
class EncodingConfig(Section, section="encoding"):
    """How clips are written: H.264 in MP4, without sound, with the time stamps of the source."""

    crf: Annotated[Number, most(51)] = 17
    """libx264's constant rate factor: 0 loses nothing, 17 is hard to tell from the source, 51 is worst."""

    preset: str = "medium"
    """libx264's preset: slower ones make smaller files."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in PRESETS:
            raise InputError(f"encoding.preset {self.preset!r}: give one of {', '.join(PRESETS)}")


COLOURS = ("color_range", "colorspace", "color_primaries", "color_trc")
"""What a frame says of its colours."""

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")


REPRODUCIBLE = {"x264-params": "mbtree=0"}
"""With x264's macroblock tree and B-frames (core 165, its assembler code) the bytes depend on what memory held before:
8 encodings of one clip gave 3 different files, without the tree one."""


def frames_of(video: Video, span: Span) -> Iterator[Frame]:
    """The frames of a span."""
    return itertools.takewhile(lambda frame: frame.stamp < span.end_stamp, video.frames(span.first_stamp))


def looked_at(video: Video, span: Span) -> np.ndarray:
    """The frames that filters look at: RGB uint8 [T, H, W, C], of one size, turned as they are shown.

    Raises:
        MediaError: they cannot be decoded.
    """
    step = Fraction(1 / LOOKED_AT_RATE) / video.timeline.unit
    found: list[np.ndarray] = []
    wanted = Fraction(span.first_stamp)
    current: Frame | None = None

    def look(until: int) -> None:
        """The frame on show at each time is the last one that is not later."""
        nonlocal wanted
        while current is not None and wanted < until:
            found.append(current.pixels(LOOKED_AT_EDGE))
            wanted += step

    for frame in frames_of(video, span):
        look(frame.stamp)
        current = frame
    look(span.end_stamp)
    if not found:
        raise MediaError(f"no frame from {span.start_s:g} s on can be decoded")
    height, width = found[0].shape[:2]
    same = [frame for frame in found if frame.shape[:2] == (height, width)]
    if len(same) < len(found):
        raise MediaError("the picture size changes within a scene")
    return np.stack(same)


def aesthetic_frames(frames_THWC: np.ndarray) -> np.ndarray:
    """AESTHETIC_FRAMES of the frames looked at, evenly spaced; each as often as needed, of a clip that has fewer."""
    places = evenly_spaced(0, len(frames_THWC), AESTHETIC_FRAMES)
    return frames_THWC[[int(place) for place in places]]


def clip_file(extent: Extent, span: Span, suffix: str, encoding: EncodingConfig) -> tuple[bytes, str]:
    """(bytes, suffix) of a clip's file: a whole video as it is, with its own `suffix`; a part encoded anew as MP4.

    Equal frames and options give equal bytes.

    Raises:
        MediaError: its frames cannot be decoded.
    """
    if span.is_whole:
        return extent.read(), suffix
    with Video(extent.open()) as video:
        return _encoded(video, span, encoding), "mp4"


def _encoded(video: Video, span: Span, encoding: EncodingConfig) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = None
        for frame in frames_of(video, span):
            picture = _encodable(frame)
            if stream is None:
                stream = container.add_stream("libx264", rate=video.timeline.frame_rate)
                stream.codec_context.thread_count = 1  # more of them change the bytes
                stream.codec_context.time_base = video.timeline.unit
                stream.options = {"crf": str(encoding.crf), "preset": encoding.preset, **REPRODUCIBLE}
                stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, "yuv420p"
                aspect = frame.pixel_aspect
                stream.codec_context.sample_aspect_ratio = 1 / aspect if frame.orientation.is_transposed else aspect
                for name in COLOURS:
                    setattr(stream.codec_context, name, getattr(picture, name))
            if (picture.width, picture.height) != (stream.width, stream.height):
                raise MediaError("the picture size changes within a scene")
            picture.pts, picture.time_base = frame.stamp - span.first_stamp, video.timeline.unit
            picture.pict_type = av.video.frame.PictureType.NONE  # the source's kind of frame would be forced on it
            container.mux(stream.encode(picture))
        if stream is None:
            raise MediaError(f"no frame from {span.start_s:g} s on can be decoded")
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _encodable(frame: Frame) -> av.VideoFrame:
    """The frame as YUV 4:2:0, upright, its sides cut to even numbers, in the colours that it names.

    Planes are turned, not pixels: they keep the source's matrix and range.
    """
    decoded = frame.decoded
    # RGB has no matrix, and gets the one that players take for what they know nothing of.
    matrix = Colorspace.ITU709 if decoded.format.is_rgb else None
    with faults():
        source = decoded.reformat(format="yuv420p", dst_colorspace=matrix, threads=CONVERTING_THREADS)
        height, width = source.height - source.height % 2, source.width - source.width % 2
        if frame.orientation == Orientation() and (height, width) == (source.height, source.width):
            return source
        planes = [
            frame.orientation.apply(_plane(plane)[: height // scale, : width // scale])
            for plane, scale in zip(source.planes, (1, 2, 2), strict=True)
        ]
        picture = av.VideoFrame(planes[0].shape[1], planes[0].shape[0], "yuv420p")
        for plane, pixels_HW in zip(picture.planes, planes, strict=True):
            _plane(plane)[:] = pixels_HW
    for name in COLOURS:
        setattr(picture, name, getattr(source, name))
    return picture


def _plane(plane: av.video.plane.VideoPlane) -> np.ndarray:
    """The bytes [H, W] of a plane, whose rows may be padded."""
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]

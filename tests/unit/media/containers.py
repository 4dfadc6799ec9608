"""Clips whose containers say unusual things, for the tests of what reads them."""

import io
import struct
from collections.abc import Callable, Sequence

import av
import numpy as np

B_FRAMES = {"g": "12", "x264-params": "b-adapt=0:bframes=2"}
"""Options of libx264: every third frame is stored before the two that are shown before it."""


def numbered(count: int, size: tuple[int, int] = (64, 64)) -> list[np.ndarray]:
    """Frames of grey; frame i has the value 10 * i."""
    return [np.full((*size, 3), 10 * number, np.uint8) for number in range(count)]


def numbers_of(frames: Sequence[np.ndarray]) -> list[int]:
    """The numbers of such frames, whatever lossy coding did to them."""
    return [round(frame.mean() / 10) for frame in frames]


def encoded(
    frames: Sequence[np.ndarray],
    form: str,
    *,
    codec: str = "libx264",
    rate: int = 12,
    options: dict[str, str] | None = None,
    prepare: Callable[[av.VideoStream], object] = lambda stream: None,
    convert: Callable[[av.VideoFrame], av.VideoFrame] = lambda frame: frame,
) -> bytes:
    """A clip of RGB frames in the container format `form`; `prepare` may change the stream before its first frame,
    `convert` every frame."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        prepare(stream)
        for pixels in frames:
            container.mux(stream.encode(convert(av.VideoFrame.from_ndarray(pixels, format="rgb24"))))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def trimmed(mp4: bytes, units: int) -> bytes:
    """An MP4 whose edit list begins so many units of its clock later, as `ffmpeg -ss -c copy` and phones write."""
    place = mp4.index(b"elst") + len(b"elst") + 4 + 4 + 4  # version and flags, number of edits, duration
    (media_time,) = struct.unpack_from(">i", mp4, place)
    return mp4[:place] + struct.pack(">i", media_time + units) + mp4[place + 4 :]


def with_cover(mp4: bytes, jpeg: bytes) -> bytes:
    """An MP4 with cover art before its track, as editors of tags write it; the header must be at the end."""
    cover = _box(b"covr", _box(b"data", struct.pack(">II", 13, 0) + jpeg))  # 13: JPEG (iTunes metadata)
    handler = _box(b"hdlr", struct.pack(">II", 0, 0) + b"mdirappl" + bytes(9))
    tags = _box(b"udta", _box(b"meta", bytes(4) + handler + _box(b"ilst", cover)))
    header, track = mp4.rindex(b"moov"), mp4.index(b"trak") - 4
    (size,) = struct.unpack_from(">I", mp4, header - 4)
    return mp4[: header - 4] + struct.pack(">I", size + len(tags)) + mp4[header:track] + tags + mp4[track:]


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content

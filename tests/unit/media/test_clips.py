"""Decoding of clips: which frames, at which rate, and what is refused."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from megatron_ext.media import MediaError, decode_clip


def encoded(count: int, rate: int, size: tuple[int, int] = (32, 48)) -> bytes:
    """A lossless clip whose frame i is grey of value 5 * i."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "bgr0"
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 5 * index, np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def frame_numbers(data: bytes, **options):
    options = {"frame_rate": None, "max_frames": 100, "multiple": 4, "resize": lambda frame: frame, **options}
    clip = decode_clip(data, **options)
    return (clip.frames_THWC[:, 0, 0, 0] // 5).tolist(), clip


def test_own_rate_keeps_every_frame():
    numbers, clip = frame_numbers(encoded(9, 10))
    assert numbers == list(range(8)), "cut to a multiple of four"
    assert clip.frames_THWC.shape == (8, 32, 48, 3) and clip.frames_THWC.dtype == np.uint8
    assert (clip.frame_rate_mhz, clip.duration_ms) == (10_000, 800)


def test_lower_and_higher_rates_show_what_is_on_then():
    numbers, clip = frame_numbers(encoded(24, 24), frame_rate=8.0)
    assert numbers == [0, 3, 6, 9, 12, 15, 18, 21]
    assert (clip.frame_rate_mhz, clip.duration_ms) == (8_000, 1000)
    assert frame_numbers(encoded(4, 10), frame_rate=20.0)[0] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert frame_numbers(encoded(10, 10), frame_rate=4.0)[0] == [0, 2, 5, 7]


def test_frames_are_limited_and_resized_as_they_come():
    numbers, clip = frame_numbers(encoded(40, 10), max_frames=6, resize=lambda frame: frame[:16, :16])
    assert numbers == [0, 1, 2, 3] and clip.frames_THWC.shape == (4, 16, 16, 3)


@pytest.mark.parametrize("data", [b"", b"no clip", encoded(8, 10)[:300]], ids=["empty", "text", "cut"])
def test_damage_is_a_media_error(data):
    with pytest.raises(MediaError):
        frame_numbers(data)


def test_pictures_of_two_sizes_are_refused():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuvj420p"
        for index, size in enumerate([(48, 32)] * 4 + [(64, 32)] * 4):
            picture = io.BytesIO()
            Image.new("RGB", size).save(picture, "jpeg")
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, index, index, True
            packet.time_base = Fraction(1, 10)
            container.mux(packet)
    with pytest.raises(MediaError, match="picture size changes"):
        frame_numbers(buffer.getvalue())
    assert frame_numbers(buffer.getvalue(), max_frames=4)[1].frames_THWC.shape == (4, 32, 48, 3)


def test_too_few_frames_are_refused():
    with pytest.raises(MediaError, match="3 frames at 10 a second: at least 4"):
        frame_numbers(encoded(3, 10))


def test_sound_without_pictures_is_refused():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(MediaError, match="no video stream"):
        frame_numbers(buffer.getvalue())

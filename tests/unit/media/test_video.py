"""What unusual containers show: order, times, cover art, cut frames, turned and mirrored frames, pixels, colours."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from megatron_ext.media import MediaError, decode_clip, decode_frames, read_header
from megatron_ext.media.samples import Extent, Sample
from megatron_ext.media.video import Video
from tests.unit.media.containers import B_FRAMES, encoded, numbered, numbers_of, trimmed, with_cover


def header_of(data: bytes, folder: Path, suffix: str = "mp4"):
    path = folder / f"clip.{suffix}"
    path.write_bytes(data)
    media = Extent(path=path, offset=0, size=len(data), stamp=0)
    return read_header(Sample(key="clip", kind="video", source=str(path), media=media, text=None, fields=None))


def whole(data: bytes, **options) -> np.ndarray:
    options = {"frame_rate": None, "max_frames": 100, "multiple": 1, "resize": lambda frame: frame, **options}
    return decode_clip(data, **options).frames_THWC


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(buffer, "jpeg")
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["avi", "mp4", "matroska", "mpegts", "flv"])
def test_frames_come_in_the_order_in_which_they_are_shown(form):
    """AVI has no times of showing: its frames' stamps count them as they are stored."""
    data = encoded(numbered(24), form, options=B_FRAMES)
    assert numbers_of(whole(data)) == list(range(24))
    assert numbers_of(whole(data, frame_rate=4.0)) == list(range(0, 24, 3))
    for numbers in ([0], [14, 15, 16], [23], list(range(24))):
        assert numbers_of(decode_frames(data, numbers)) == numbers
    with Video(io.BytesIO(data)) as video:
        timeline = video.timeline
        at = {timeline.seconds(frame.stamp): frame for frame in video.frames()}
        assert list(at) == pytest.approx([number / 12 for number in range(24)], abs=1e-3)
        assert numbers_of([frame.pixels() for frame in at.values()]) == list(range(24))
        wanted = timeline.shown_at([0.5, 1.0, 1.9])
        assert numbers_of([frame.pixels() for frame in video.frames_at(wanted)]) == [6, 12, 22]


def test_times_that_go_back_are_refused():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 40, 40, "yuvj420p"
        for dts, pts in enumerate([10, 11, 13, 12, 14]):
            packet = av.Packet(jpeg())
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, pts, dts, True
            packet.time_base = Fraction(1, 10)
            container.mux(packet)
    with pytest.raises(MediaError, match="the time stamps of its frames go back"):
        whole(buffer.getvalue())


def test_a_rate_that_no_frame_keeps_is_not_taken():
    """Browsers record WebM that claims 1,000 frames a second, the unit of its clock."""

    def retimed(frame: av.VideoFrame) -> av.VideoFrame:
        frame.pts, frame.time_base = 40 * next(count), Fraction(1, 1000)
        return frame

    count = iter(range(12))
    data = encoded(numbered(12), "matroska", codec="mpeg4", rate=1000, convert=retimed)
    clip = decode_clip(data, frame_rate=None, max_frames=100, multiple=1, resize=lambda frame: frame)
    assert (clip.frame_rate_mhz, numbers_of(clip.frames_THWC)) == (25_000, list(range(12)))


def test_frames_that_an_edit_list_cuts_off_are_not_there(tmp_path):
    data = encoded(numbered(24), "mp4", options=B_FRAMES)
    kept = list(range(6, 24))
    cut = trimmed(data, 6144)  # half a second of a clock of 12,288: frames 0 to 5
    assert numbers_of(whole(cut)) == kept
    header = header_of(cut, tmp_path)
    assert (header.num_frames, header.frame_rate, header.codec) == (18, 12, "h264-other")
    assert numbers_of(decode_frames(cut, range(header.num_frames))) == kept
    assert header_of(data, tmp_path).codec == "h264", "nothing is cut here"


@pytest.mark.parametrize("form", ["mp4", "avi"])
def test_frames_that_are_not_in_the_file_do_not_count(form, tmp_path):
    """A download that ends early, of a container whose header stands first: it claims all frames."""
    options = {"movflags": "faststart"} if form == "mp4" else {}
    path = tmp_path / "whole"
    frames = [np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8) for number in range(24)]
    with av.open(str(path), "w", format=form, options=options) as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    data = data[: len(data) * 2 // 3]
    header = header_of(data, tmp_path, form)
    assert 8 < header.num_frames < 20
    assert len(decode_frames(data, range(header.num_frames))) == header.num_frames


def test_cover_art_is_not_the_video(tmp_path):
    data = with_cover(encoded(numbered(12), "mp4"), jpeg())
    with av.open(io.BytesIO(data)) as container:
        assert [stream.codec_context.name for stream in container.streams.video] == ["mjpeg", "h264"]
    assert numbers_of(whole(data)) == list(range(12))
    assert numbers_of(decode_frames(data, [3, 7])) == [3, 7]
    header = header_of(data, tmp_path)
    assert (header.num_frames, header.height, header.codec) == (12, 64, "h264-other")


ONE = 1 << 16
MATRICES = {
    # (a, b, c, d) and the corners in which marks of the upper left and the upper right corner are shown.
    "identity": ((ONE, 0, 0, ONE), "upper left", "upper right"),
    "mirrored": ((-ONE, 0, 0, ONE), "upper right", "upper left"),
    "upside down": ((ONE, 0, 0, -ONE), "lower left", "lower right"),
    "turned by 180": ((-ONE, 0, 0, -ONE), "lower right", "lower left"),
    "turned left": ((0, -ONE, ONE, 0), "lower left", "upper left"),
    "turned right": ((0, ONE, -ONE, 0), "upper right", "lower right"),
    "transposed": ((0, ONE, ONE, 0), "upper left", "lower left"),
    "transposed the other way": ((0, -ONE, -ONE, 0), "lower right", "upper right"),
}


def corners(frame_HWC: np.ndarray) -> dict[str, int]:
    """The mean of each corner."""
    parts = {"upper left": (0, 0), "upper right": (0, -16), "lower left": (-16, 0), "lower right": (-16, -16)}
    return {name: frame_HWC[y : y + 16 or None, x : x + 16 or None].mean() for name, (y, x) in parts.items()}


@pytest.mark.parametrize("name", MATRICES)
def test_frames_are_turned_and_mirrored(name, tmp_path):
    (a, b, c, d), first, second = MATRICES[name]
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:16, :16], pixels[:16, -16:] = 250, 120
    matrix = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    data = encoded([pixels] * 2, "mp4", prepare=lambda stream: stream.set_display_matrix(matrix))
    shown = whole(data)[0]
    found = corners(shown)
    assert found.pop(first) == pytest.approx(250, abs=5) and found.pop(second) == pytest.approx(120, abs=5)
    assert max(found.values()) < 5
    header = header_of(data, tmp_path)
    assert (header.height, header.width) == shown.shape[:2] == ((96, 64) if a == 0 else (64, 96))
    assert header.codec == ("h264" if name == "identity" else "h264-other")


@pytest.mark.parametrize(
    "aspect, is_turned, size", [("2/1", False, (64, 128)), ("1/2", False, (128, 64)), ("2/1", True, (128, 64))]
)
def test_pixels_become_square(aspect, is_turned, size, tmp_path):
    def prepare(stream: av.VideoStream) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if is_turned:
            stream.set_display_rotation(90)

    data = encoded(numbered(4), "mp4", prepare=prepare)
    frames = whole(data)
    assert frames.shape[1:3] == size and numbers_of(frames) == [0, 1, 2, 3]
    header = header_of(data, tmp_path)
    assert (header.height, header.width) == size and header.codec == "h264-other"
    assert decode_frames(data, [1]).shape[1:3] == size


@pytest.mark.parametrize("aspect, message", [("405/404", None), ("20/1", "pixels of 20:1")])
def test_pixels_almost_square_and_impossible_ones(aspect, message, tmp_path):
    data = encoded(
        numbered(2),
        "mp4",
        prepare=lambda stream: setattr(stream.codec_context, "sample_aspect_ratio", Fraction(aspect)),
    )
    if message is None:
        assert whole(data).shape[1:3] == (64, 64) and header_of(data, tmp_path).codec == "h264"
    else:
        with pytest.raises(MediaError, match=message):
            whole(data)


COLOUR = (30, 180, 60)


@pytest.mark.parametrize("matrix, range_", [(1, 1), (1, 2), (5, 1), (5, 2), (9, 1)], ids=str)
def test_colours_are_those_of_the_clip_s_own_matrix(matrix, range_):
    """BT.709, BT.601 and BT.2020, in limited and full range."""

    def prepare(stream: av.VideoStream) -> None:
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, range_

    def convert(frame: av.VideoFrame) -> av.VideoFrame:
        return frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=range_)

    pixels = np.full((32, 32, 3), COLOUR, np.uint8)
    data = encoded([pixels] * 2, "mp4", options={"qp": "0"}, prepare=prepare, convert=convert)
    # Measured: at most 2 levels; another matrix or range is 13 off and more.
    assert np.abs(whole(data).astype(int) - COLOUR).max() <= 3

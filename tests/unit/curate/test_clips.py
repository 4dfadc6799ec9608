"""Clips as files: which frames, with which times, and nothing lost."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from megatron_ext.config import InputError
from megatron_ext.curate.clips import EncodingConfig, aesthetic_frames, clip_file, looked_at
from megatron_ext.curate.scenes import ScenesConfig, split
from megatron_ext.media.video import Video
from tests.unit.curate.films import extent_of, film, shot
from tests.unit.media.containers import encoded


def numbered(count: int, size: tuple[int, int] = (64, 96)) -> np.ndarray:
    """Grey frames whose value tells their number."""
    return np.stack([np.full((*size, 3), 4 * number + 8, np.uint8) for number in range(count)])


def numbers_of(frames: np.ndarray) -> list[int]:
    return np.rint((frames.mean(axis=(1, 2, 3)) - 8) / 4).astype(int).tolist()


def decoded(data: bytes) -> tuple[np.ndarray, list[float]]:
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [frame.time for frame in frames]


def parts_of(extent, max_clip_s):
    with Video(extent.open()) as video:
        return split(video, ScenesConfig(max_clip_s=max_clip_s))


def test_two_frames_per_second_are_looked_at(tmp_path):
    extent = film(numbered(48), tmp_path / "film.mp4", rate=12)  # 4 seconds
    spans = parts_of(extent, 3)
    with Video(extent.open()) as video:
        assert [numbers_of(looked_at(video, span)) for span in spans] == [[0, 6, 12, 18], [24, 30, 36, 42]]
    large = film(np.zeros((4, 300, 600, 3), np.uint8), tmp_path / "large.mp4")
    (span,) = parts_of(large, 10)
    with Video(large.open()) as video:
        assert looked_at(video, span).shape == (1, 256, 512, 3), "a shorter edge of 256"


def test_three_frames_are_for_the_aesthetic_score():
    assert numbers_of(aesthetic_frames(numbered(30))) == [5, 15, 25]
    assert numbers_of(aesthetic_frames(numbered(2))) == [0, 1, 1]
    assert numbers_of(aesthetic_frames(numbered(1))) == [0, 0, 0]


@pytest.mark.parametrize("suffix, codec", [("mp4", "libx264"), ("mkv", "mpeg4"), ("webm", "libvpx"), ("avi", "mpeg4")])
def test_a_part_has_its_frames_and_their_times(tmp_path, suffix, codec):
    extent = film(numbered(40), tmp_path / f"film.{suffix}", rate=10, codec=codec)
    spans = parts_of(extent, 1.5)
    assert [span.num_frames for span in spans] == [14, 13, 13]
    first = 0
    for span in spans:
        data, kind = clip_file(extent, span, suffix, EncodingConfig())
        frames, times = decoded(data)
        assert kind == "mp4" and numbers_of(frames) == list(range(first, first + span.num_frames))
        assert times == pytest.approx([number / 10 for number in range(span.num_frames)], abs=1e-3)
        first += span.num_frames
    assert clip_file(extent, spans[1], suffix, EncodingConfig()) == clip_file(
        extent, spans[1], suffix, EncodingConfig()
    )


def test_quality(tmp_path):
    source = shot("tree_hand")
    extent = film(source, tmp_path / "film.mp4")
    _, span = parts_of(extent, 2)
    frames, _ = decoded(clip_file(extent, span, "mp4", EncodingConfig())[0])
    with Video(extent.open()) as video:
        before = np.stack([frame.pixels() for frame in video.frames(span.first_stamp)])
    error = np.square(frames.astype(float) - before).mean()
    assert 10 * np.log10(255**2 / error) > 36  # measured: 38.9 dB
    worse = clip_file(extent, span, "mp4", EncodingConfig(crf=40, preset="ultrafast"))[0]
    assert len(worse) < len(clip_file(extent, span, "mp4", EncodingConfig())[0]) / 3


def test_equal_frames_give_equal_bytes(tmp_path):
    """Whatever memory held before; with B-frames, the kind that x264's macroblock tree makes depend on it."""
    extent = film(shot("tree_hand"), tmp_path / "film.mp4")
    span = parts_of(extent, 2)[1]
    made, kept = set(), []
    for number in range(6):
        kept.append(np.random.default_rng(number).integers(0, 255, 100_000 * (number + 1), dtype=np.uint8))
        made.add(clip_file(extent, span, "mp4", EncodingConfig())[0])
        del kept[:-3]
    assert len(made) == 1


def test_a_whole_video_stays_as_it_is(tmp_path):
    extent = film(numbered(8), tmp_path / "film.webm", codec="libvpx")
    (span,) = parts_of(extent, 20)
    assert clip_file(extent, span, "webm", EncodingConfig()) == (extent.read(), "webm")


def test_odd_sides_lose_a_row(tmp_path):
    extent = film(numbered(16, (63, 95)), tmp_path / "film.mkv", rate=8, codec="ffv1")
    span = parts_of(extent, 1.5)[1]
    frames, _ = decoded(clip_file(extent, span, "mkv", EncodingConfig())[0])
    assert frames.shape[1:3] == (62, 94) and numbers_of(frames) == list(range(8, 16))


@pytest.mark.parametrize(
    "matrix, full, turned, size",
    [(1, False, True, (64, 96)), (1, False, False, (63, 95)), (1, True, True, (64, 96)), (5, True, False, (63, 95))],
)
def test_a_part_keeps_its_colours_turned_or_cut(tmp_path, matrix, full, turned, size):
    """BT.709 and BT.601, limited and full range; a mark in the upper left corner, and pixels twice as wide as high."""
    pixels = np.full((*size, 3), (30, 180, 60), np.uint8)
    pixels[:16, :16] = 250

    def prepare(stream):
        stream.pix_fmt = "yuv444p"  # odd sides are not for 4:2:0
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        if turned:
            stream.set_display_rotation(90)

    def convert(frame):
        return frame.reformat(format="yuv444p", dst_colorspace=matrix, dst_color_range=2 if full else 1)

    path = tmp_path / "film.mp4"
    path.write_bytes(encoded([pixels] * 20, "mp4", rate=10, options={"qp": "0"}, prepare=prepare, convert=convert))
    extent = extent_of(path)
    content, _ = clip_file(extent, parts_of(extent, 1.5)[1], "mp4", EncodingConfig(crf=1))
    with Video(extent.open()) as source, Video(io.BytesIO(content)) as clip:
        before, after = (next(video.frames()).pixels().astype(int) for video in (source, clip))
    even = [side - side % 2 for side in size]
    assert after.shape[:2] == ((2 * even[1], even[0]) if turned else (even[0], 2 * even[1]))
    mark = after[-8:, :8] if turned else after[:8, :8]
    # Measured: 1 level of 255; BT.601 in place of BT.709 is 25 off.
    assert np.abs(mark - 250).max() <= 4 and np.abs(after[40, 40] - before[40, 40]).max() <= 3
    assert np.abs(after[40, 40] - (30, 180, 60)).max() <= 3


def test_time_stamps_that_begin_late_and_jump(tmp_path):
    """Three frames a tenth of a second apart, a gap of one second, three more; the first at 7 seconds."""
    times = [7.0, 7.1, 7.2, 8.2, 8.3, 8.4]
    path = tmp_path / "film.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.bit_rate, stream.codec_context.time_base = 8_000_000, Fraction(1, 1000)
        for pixels, time in zip(numbered(6), times, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    extent = extent_of(path)
    first, second = parts_of(extent, 1.3)
    assert (first.start_s, second.start_s, second.end_s) == pytest.approx((0, 1.2, 1.5), abs=0.02)
    with Video(extent.open()) as video:
        assert numbers_of(looked_at(video, first)) == [0, 2, 2], "what is on show at 0, 0.5 and 1 second"
    frames, shown = decoded(clip_file(extent, second, "mkv", EncodingConfig())[0])
    assert numbers_of(frames) == [3, 4, 5] and shown == pytest.approx([0, 0.1, 0.2], abs=1e-3)


def test_options_are_checked():
    with pytest.raises(InputError, match="encoding.crf 52: must be at most 51"):
        EncodingConfig(crf=52)
    with pytest.raises(InputError, match="encoding.preset 'best': give one of ultrafast"):
        EncodingConfig(preset="best")

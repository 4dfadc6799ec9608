"""Where scenes begin, and how long ones are cut."""

from fractions import Fraction

import numpy as np
import pytest

from megatron_ext.config import InputError
from megatron_ext.curate.scenes import ScenesConfig, find_cuts, split
from megatron_ext.media import MediaError
from megatron_ext.media.video import Video
from tests.unit.curate.films import extent_of, fade_out_and_in, film, shot


def spans_of(extent, **options):
    with Video(extent.open()) as video:
        return split(video, ScenesConfig(**options))


def test_cuts_between_real_shots(tmp_path):
    rabbit, tree = shot("rabbit")[::3], shot("tree_hand")
    extent = film([*rabbit, *tree, *rabbit], tmp_path / "film.mp4")
    spans = spans_of(extent)
    assert [(span.number, span.num_frames) for span in spans] == [(0, 16), (1, 24), (2, 16)]
    assert [(span.start_s, span.end_s) for span in spans] == [(0, 2), (2, 5), (5, 7)]
    assert not any(span.is_whole for span in spans)
    with Video(extent.open()) as video:
        stamps = [frame.stamp for frame in video.frames()]
    assert [span.first_stamp for span in spans] == [stamps[0], stamps[16], stamps[40]]
    assert [span.end_stamp for span in spans[:2]] == [stamps[16], stamps[40]] and spans[2].end_stamp > stamps[-1]


def test_one_shot_is_one_span(tmp_path):
    for name, seconds in (("rabbit", 1.92), ("tree_hand", 3.0)):
        (span,) = spans_of(film(shot(name), tmp_path / f"{name}.mp4", rate=round(len(shot(name)) / seconds)))
        assert span.is_whole and span.num_frames == len(shot(name)) and span.duration_s == pytest.approx(seconds)


def test_a_fade_is_cut_in_the_black():
    # The two shots are parts of one, so that no frame differs much from the one before: only the fade says it.
    tree = shot("tree_hand")
    frames = fade_out_and_in(tree, tree, 12)
    dark = np.flatnonzero(frames.mean(axis=(1, 2, 3)) < 12)
    (cut,) = find_cuts(frames[..., ::-1], Fraction(8), ScenesConfig(content_threshold=255))
    assert dark[0] < cut <= dark[-1] + 1 and cut == pytest.approx(24, abs=1)
    assert find_cuts(frames[..., ::-1], Fraction(8), ScenesConfig(content_threshold=255, fade_threshold=1e-3)) == []


def test_a_flash_is_one_cut():
    tree = np.repeat(shot("tree_hand"), 2, axis=0)
    tree[20] = 255
    assert find_cuts(tree, Fraction(16), ScenesConfig(min_scene_s=0.6)) == [20]
    assert find_cuts(tree, Fraction(16), ScenesConfig(min_scene_s=0)) == [20, 21]


def test_long_scenes_are_cut_evenly(tmp_path):
    extent = film(shot("tree_hand"), tmp_path / "film.mp4")  # 3 seconds at 8 frames per second
    spans = spans_of(extent, max_clip_s=1.2)
    assert [(span.start_s, span.end_s, span.num_frames) for span in spans] == [(0, 1, 8), (1, 2, 8), (2, 3, 8)]
    assert [span.num_frames for span in spans_of(extent, max_clip_s=0.01)] == [1] * 24, "at least a frame each"


def test_every_frame_is_in_one_span_also_at_an_uneven_rate(tmp_path):
    extent = film(shot("rabbit"), tmp_path / "film.mkv", rate=29, codec="mpeg4")
    spans = spans_of(extent, max_clip_s=0.5)
    assert sum(span.num_frames for span in spans) == 48
    assert all(0.2 <= span.duration_s < 0.55 for span in spans)
    assert [span.start_s for span in spans[1:]] == [span.end_s for span in spans[:-1]]


def test_damage_is_a_media_error(tmp_path):
    whole = film(shot("tree_hand"), tmp_path / "film.mp4").path.read_bytes()
    for content in (b"", b"no film", whole[: len(whole) // 2]):
        (tmp_path / "damaged.mp4").write_bytes(content)
        with pytest.raises(MediaError):
            spans_of(extent_of(tmp_path / "damaged.mp4"))


def test_options_are_checked():
    with pytest.raises(InputError, match="scenes.max_clip_s 0"):
        ScenesConfig(max_clip_s=0)

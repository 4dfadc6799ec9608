"""Videos to clips: rows, clips and report of one run; restarts, shards and kills end with the same bytes."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.config import BadSamples, InputError
from megatron_ext.curate.clip_parts import SCHEMA, JudgedClip, JudgedVideo, write_part
from megatron_ext.curate.clips import Span
from megatron_ext.curate.pictures import clip_square
from megatron_ext.curate.table import PartTable
from megatron_ext.curate.video_filters import Looked, VideoFiltersConfig, judge_aesthetics
from megatron_ext.media import Sample, list_samples
from megatron_ext.media.samples import Extent
from megatron_ext.media.video import Video
from tests.support.processes import children_of, command_of, is_running
from tests.support.small_clip import SIDE, head_weights, plain_scores, save_clip
from tests.unit.curate.films import CLIPS, extent_of, film, shot
from tools import curate_videos

RATE = 8
BASIC = ["--filters.min_shorter_edge=192", "--encoding.preset=ultrafast", "--workers=0"]


def titled(frames: np.ndarray) -> np.ndarray:
    """The frames under three lines of large text."""
    frames = frames.copy()
    for frame in frames:
        for line in range(3):
            place = (4, 50 + 55 * line)
            cv2.putText(frame, "LARGE TITLE", place, cv2.FONT_HERSHEY_SIMPLEX, 0.95, (255, 255, 255), 3)
    return frames


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    return [f"--inputs=['{folder}']", f"--output={output}", *BASIC, *more]


def rows_of(output: Path) -> dict[str, dict]:
    return {row["key"]: row for row in pq.read_table(output / "rows.parquet").to_pylist()}


def contents(output: Path) -> dict[str, bytes]:
    """Everything that a run leaves."""
    files = {str(path.relative_to(output)): path for path in output.rglob("*") if path.is_file()}
    found = {name: path.read_bytes() for name, path in files.items() if path.suffix in (".tar", ".json")}
    return {**found, "rows.parquet": (output / "rows.parquet").read_bytes()}


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    """A film of five scenes, a whole clip, a broken one and a picture, curated."""
    folder = tmp_path_factory.mktemp("videos")
    rabbit, tree = shot("rabbit"), shot("tree_hand")
    still = np.repeat(tree[:1], 24, axis=0)
    scenes = [rabbit[:24], still, titled(rabbit[24:]), tree[:10], rabbit[:24]]
    film(np.concatenate(scenes), folder / "sub" / "film.mp4", RATE)
    (folder / "sub" / "film.txt").write_text("A film of several scenes.")
    film(tree, folder / "whole.webm", RATE, codec="libvpx")
    (folder / "whole.json").write_text(json.dumps({"caption_zh": "一棵树", "caption": "A tree."}))
    (folder / "broken.mp4").write_bytes(b"broken")
    shutil.copy(CLIPS.parent / "images" / "cat.jpg", folder / "cat.jpg")
    output = tmp_path_factory.mktemp("curated")
    curate_videos.main(arguments(folder, output, "--max_bad_fraction=0.5"))
    return folder, output


def test_every_scene_has_a_row(curated):
    folder, output = curated
    rows = rows_of(output)
    assert {key: (row["verdict"], row["reason"]) for key, row in rows.items()} == {
        "broken": ("unreadable", "unreadable"),
        "sub/film-00000": ("kept", ""),
        "sub/film-00001": ("dropped", "motion"),
        "sub/film-00002": ("dropped", "text"),
        "sub/film-00003": ("dropped", "duration"),
        "sub/film-00004": ("kept", ""),
        "whole-00000": ("kept", ""),
    }
    assert rows["broken"]["detail"].startswith("not a readable clip")
    times = [(rows[f"sub/film-0000{n}"]["start_s"], rows[f"sub/film-0000{n}"]["end_s"]) for n in range(5)]
    assert times == [(0, 3), (3, 6), (6, 9), (9, 10.25), (10.25, 13.25)]
    first, still, title, short = (rows[f"sub/film-0000{n}"] for n in range(4))
    assert (first["height"], first["width"], first["num_frames"], first["frame_rate"]) == (192, 192, 24, RATE)
    assert 0.002 < first["motion"] < 0.2 and still["motion"] < 0.002 and first["text"] == 0
    assert still["text"] is None, "not looked for where motion has dropped the scene"
    assert title["text"] > 0.25 and short["motion"] is None
    assert still["detail"].startswith("motion ") and still["detail"].endswith("is below 0.002")
    assert still["path"] == str(folder / "sub" / "film.mp4") and still["clip_of"] == "sub/film"


def test_kept_clips_are_samples_with_metadata(curated):
    folder, output = curated
    rows = rows_of(output)
    samples = {sample.key: sample for sample in list_samples([output / "clips" / "*.tar"])}
    assert list(samples) == [key for key, row in rows.items() if row["verdict"] == "kept"]
    for key, sample in samples.items():
        row = rows[key]
        content = sample.media.read()
        with (output / row["path"]).open("rb") as file:
            file.seek(row["offset"])
            assert file.read(row["size"]) == content, "the row says where its bytes are"
        with av.open(io.BytesIO(content)) as container:
            assert sum(1 for _ in container.decode(video=0)) == row["num_frames"]
        about = json.loads(sample.fields.read())
        assert {name: about[name] for name in ("start_s", "end_s", "motion", "text", "frame_rate", "key")} == {
            name: row[name] for name in ("start_s", "end_s", "motion", "text", "frame_rate", "key")
        }
        assert about["source"] == row["source"] and about["clip_of"] == row["clip_of"]
    table = {sample.key: sample for sample in list_samples([output / "rows.parquet"])}
    assert list(table) == list(samples), "the table is itself an input: its kept rows"
    assert all(table[key].media.read() == samples[key].media.read() for key in samples)
    assert samples["whole-00000"].media.read() == (folder / "whole.webm").read_bytes(), "not encoded anew"
    assert samples["whole-00000"].captions() == ("一棵树", "A tree.") and rows["whole-00000"]["captions"] == [
        "一棵树",
        "A tree.",
    ]
    assert samples["sub/film-00000"].captions() == (), "what is said of a film need not be true of a part"


def test_clips_of_videos_whose_keys_have_dots(tmp_path):
    table = PartTable(tmp_path, SCHEMA, {})
    span = Span(number=0, first_stamp=0, end_stamp=8, start_s=0, end_s=1, num_frames=8, is_whole=True)
    looked = Looked(height=8, width=8, frame_rate=8, captions=("A cat.",), candidates=())
    media = Extent(path=tmp_path / "x.tar", offset=0, size=0, stamp=0)
    keys = ["cat.001", "cat.002", "movie.mp4"]
    videos = [
        JudgedVideo(
            entry=Sample(key=key, kind="video", source=key, media=media, text=None, fields=None),
            looked=looked,
            clips=(JudgedClip(span=span, judgements=(), content=key.encode(), suffix="mp4"),),
        )
        for key in keys
    ]
    write_part(table, 0, videos)
    samples = list_samples([tmp_path / "clips" / "*.tar"])
    assert [sample.key for sample in samples] == [f"{key}-00000" for key in keys]
    assert [sample.media.read() for sample in samples] == [key.encode() for key in keys]
    assert all(sample.captions() == ("A cat.",) for sample in samples)


def test_the_report_tells_the_funnel(curated):
    page = (curated[1] / "report.html").read_text()
    for text in ("Funnel", "motion: mean optical flow", "share of the picture that text covers", "Dropped: motion"):
        assert text in page
    assert "data:image/png;base64," in page and "sub/film-00001" in page
    assert "Filter aesthetic was off" in page


def test_the_report_in_a_browser(curated, browser):
    with browser.page(curated[1] / "report.html") as page:
        assert page.errors == [] and page.requests == [] and page.overflow() == 0
        assert page.boxes("figure > svg") and min(box.width for box in page.boxes(".card img")) > 80
        assert page.texts("h2")[0] == "Funnel" and "Dropped: motion" in page.texts("h2")


def test_nothing_is_made_again(curated, capsys):
    folder, output = curated
    before = contents(output)
    curate_videos.main(arguments(folder, output, "--max_bad_fraction=0.5"))
    assert "is finished and nothing has changed: reused" in capsys.readouterr().out
    assert contents(output) == before
    with pytest.raises(InputError, match="made with filters .*overwrite"):
        curate_videos.main(arguments(folder, output, "--max_bad_fraction=0.5", "--filters.max_motion=0.1"))


def test_all_scores_can_be_measured(curated, tmp_path, capsys):
    """Aesthetic scores against CLIP written out, on frames picked by hand."""
    clip, head = save_clip(tmp_path / "clip"), head_weights("linear")
    torch.save(head, tmp_path / "head.pth")
    weights = [f"--aesthetic.clip={clip}", f"--aesthetic.head={tmp_path / 'head.pth'}"]
    more = ["--filters.measure_all=true", "--filters.max_text=null", "--filters.min_aesthetic=-100"]
    curate_videos.main(arguments(curated[0] / "sub", tmp_path / "out", *weights, *more))
    rows = list(rows_of(tmp_path / "out").values())
    assert [row["reason"] for row in rows] == ["", "motion", "", "duration", ""]
    assert all(row["motion"] is not None and row["aesthetic"] is not None and row["text"] is None for row in rows)
    printed = capsys.readouterr().out
    assert "filter text was off: filters.max_text is null" in printed and "filter aesthetic" not in printed
    with Video(extent_of(curated[0] / "sub" / "film.mp4").open()) as video:
        third = [frame.pixels() for frame in video.frames()][48:72:4]  # at 2 per second: six frames
    squares = np.stack([clip_square(frame, SIDE) for frame in (third[1], third[3], third[5])])
    scores = plain_scores(squares, load_file(clip / "model.safetensors"), head)
    assert scores.std() > 1e-3, "the frames differ"
    assert rows[2]["aesthetic"] == pytest.approx(scores.min().item(), abs=1e-4)  # measured: 5e-7
    merged = ["--merge_only=true", "--aesthetic.device=cuda"]  # which a job that merges need not have
    curate_videos.main(arguments(curated[0] / "sub", tmp_path / "out", *weights, *more, *merged))
    with pytest.raises(InputError, match="aesthetic.clip is given without aesthetic.head"):
        curate_videos.main(arguments(curated[0], tmp_path / "none", weights[0]))


def test_the_worst_of_three_frames_counts():
    bound = VideoFiltersConfig(min_aesthetic=5.0)
    assert judge_aesthetics([6.0, 5.0, 7.0], bound).passed
    worse = judge_aesthetics([6.0, 4.9, 7.0], bound)
    assert not worse.passed and worse.detail == "aesthetic 4.9 is below 5"
    assert not judge_aesthetics([math.nan, 6.0, 7.0], bound).passed


def test_unreadable_videos_of_one_name_are_several():
    bad = BadSamples(0.5)
    lost = {"clip_of": "film", "source": "films.tar", "verdict": "unreadable", "detail": "damaged"}
    scenes = [{"clip_of": "other", "source": "other.mp4", "verdict": verdict} for verdict in ("kept", "dropped")]
    assert curate_videos._count_bad(bad, [lost, *scenes, lost]) == 3
    assert bad.samples == [("films.tar", "damaged")] * 2


def test_too_many_unreadable_videos_stop(curated, tmp_path):
    with pytest.raises(InputError, match="1 of 3 samples cannot be used, more than max_bad_fraction 0.01"):
        curate_videos.main(arguments(curated[0], tmp_path / "out", "--filters.max_text=null"))
    with pytest.raises(InputError, match="hold no video"):
        curate_videos.main(arguments(curated[0] / "cat.jpg", tmp_path / "pictures"))


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Six videos of two scenes, one of them in a tar, and what an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("several")
    rabbit, tree = shot("rabbit"), shot("tree_hand")
    for number in range(5):
        film(np.concatenate([rabbit[number : number + 18], tree]), folder / f"film{number}.mp4", RATE)
    with tarfile.open(folder / "more.tar", "w") as tar:
        tar.add(folder / "film0.mp4", "packed.mp4")
    inputs = f"--inputs=['{folder}/film*.mp4', '{folder}/more.tar']"
    options = [inputs, *BASIC, "--filters.max_text=null", "--part_size=1"]
    output = tmp_path_factory.mktemp("undisturbed")
    curate_videos.main([*options, f"--output={output}"])
    assert len(rows_of(output)) == 12 and len(list((output / "clips").iterdir())) == 6
    return options, output


def test_shards_make_what_one_process_makes(several, tmp_path, capsys, monkeypatch):
    options, undisturbed = several
    output = tmp_path / "out"
    for task in ("5", "3"):  # a job array of two tasks, in any order
        for name, value in {"ID": task, "MIN": "3", "COUNT": "2", "STEP": "2"}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
        curate_videos.main([*options, f"--output={output}"])
        shard = 1 if task == "5" else 0
        assert f"shard {shard} of 2 is curated; when all are, run with merge_only" in capsys.readouterr().out
        assert not (output / "rows.parquet").exists()
        if shard == 1:
            with pytest.raises(InputError, match=r"3 of 6 parts are missing \(0, 2, 4\): run the jobs that lack them"):
                curate_videos.main([*options, f"--output={output}", "--merge_only=true"])
    curate_videos.main([*options, f"--output={output}", "--merge_only=true"])
    assert contents(output) == contents(undisturbed)
    with pytest.raises(InputError, match="overwrite with 2 shards would remove what other jobs wrote"):
        curate_videos.main([*options, f"--output={output}", "--overwrite=true"])


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(several, tmp_path):
    options, undisturbed = several
    output = tmp_path / "out"
    command = [sys.executable, "-m", "tools.curate_videos", *options, f"--output={output}", "--workers=2"]

    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, cwd=CLIPS.parents[2], stderr=stderr)

    def wait_for(parts: int) -> list[int]:
        """The workers, once that many parts are done."""
        while True:
            serving = [pid for pid in children_of(process.pid) if "serve(" in command_of(pid)]
            if len(list((output / "parts").glob("part-*.parquet"))) >= parts and serving:
                return serving
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            time.sleep(0.01)

    # A worker is killed: another takes its place. The program is killed: its processes end with it.
    os.kill(wait_for(1)[0], signal.SIGKILL)
    workers = wait_for(2)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.02)
    assert len(list((output / "parts").glob("part-*.parquet"))) < 6
    (output / "clips" / ".clips-000005.tar.1234.tmp").write_bytes(b"torn")
    curate_videos.main([*options, f"--output={output}"])
    assert not list(output.rglob("*.tmp"))
    assert contents(output) == contents(undisturbed)


def test_what_an_earlier_making_left_is_removed(several, tmp_path):
    options, undisturbed = several
    output = shutil.copytree(undisturbed, tmp_path / "out")
    more = ["--filters.min_clip_s=2.5", "--part_size=4", "--overwrite=true"]
    curate_videos.main([*options, *more, f"--output={output}"])
    rows = rows_of(output)
    assert [row["reason"] for row in rows.values()] == ["duration", ""] * 6
    assert {row["path"] for row in rows.values() if row["verdict"] == "kept"} == {
        f"clips/{path.name}" for path in (output / "clips").iterdir()
    }
    with pytest.raises(InputError, match="none of the 12 scenes was kept"):
        curate_videos.main([*options, *more, "--filters.min_clip_s=5", f"--output={output}"])
    assert not list((output / "clips").iterdir())

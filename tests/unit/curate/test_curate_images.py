"""The program that curates pictures, from files to verdicts, lists, tars and the page."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import CLIPVisionModelWithProjection

from megatron_ext.config import InputError
from megatron_ext.curate.colour import colour_spread
from megatron_ext.curate.inputs import pieces_of
from megatron_ext.curate.pictures import clip_square
from megatron_ext.curate.text import text_share
from megatron_ext.media import decode_picture, list_samples
from tests.support.small_clip import SIDE, head_weights, plain_scores, save_clip
from tests.support.tars import write_tar
from tests.unit.curate.drawn import clouds, encoded, lines
from tools.curate_images import main

ROOT = Path(__file__).parents[3]
SMALL = ["--filters.min_side", "64", "--workers", "0"]


def rows_of(output: Path) -> dict[str, dict]:
    return {row["source"]: row for row in pq.read_table(output / "rows.parquet").to_pylist()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """Tars and a folder with everything that can become of a picture."""
    folder = tmp_path_factory.mktemp("inputs")
    pictures = folder / "pictures"
    pictures.mkdir()
    large = clouds(1, 160, 128)
    half = np.asarray(decode_picture(encoded(large)))[::2, ::2]
    files = {
        "good.png": encoded(clouds(0)),
        "good.txt": "云 clouds".encode(),
        "small.png": encoded(clouds(2, 63, 500)),
        "twin_a.jpg": encoded(clouds(3), "JPEG"),
        "twin_b.jpg": encoded(clouds(3), "JPEG"),
        "pixels_a.bmp": encoded(clouds(4), "BMP"),
        "pixels_b.png": encoded(clouds(4)),
        "near_half.png": encoded(half),
        "near_large.png": encoded(large),
        "empty.jpg": b"",
        "broken.jpg": encoded(clouds(5), "JPEG")[:-300],
        "no_picture.jpg": b"<html>",
        "clip.mp4": b"not looked at",
    }
    for name, content in files.items():
        (pictures / name).write_bytes(content)
    write_tar(folder / "a.tar", {"good.png": encoded(clouds(6)), "t1.jpg": encoded(clouds(7), "JPEG")})
    write_tar(folder / "b.tar", {"t2.jpg": encoded(clouds(8), "JPEG"), "t2.json": b'{"caption": "second"}'})
    (folder / "c.tar").write_bytes(b"no tar at all")
    return [str(folder / "?.tar"), str(pictures)]


def test_pieces_are_in_the_order_of_the_inputs(inputs):
    """Of two pictures of one key the earlier stays: who names an input first says which."""

    def first_paths(named: list[str]) -> list[str]:
        pieces, digest = pieces_of(named, 100)
        digests.add(digest)
        return [Path(piece.part.paths[0]).name for piece in pieces]

    digests: set[str] = set()
    assert first_paths(inputs) == ["a.tar", "b.tar", "c.tar", "pictures"]
    assert first_paths(inputs[::-1]) == ["pictures", "a.tar", "b.tar", "c.tar"]
    assert len(digests) == 2


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    main(["--inputs", json.dumps(inputs), "--output", str(output), "--kept", "tars", "--pictures_per_tar", "3",
          "--piece_size", "4", *SMALL])  # fmt: skip
    return output


def test_every_input_has_its_row(inputs, undisturbed, capsys):
    found = {Path(source).name: row["reason"] for source, row in rows_of(undisturbed).items()}
    assert found == {
        "a.tar:good.png": "",
        "a.tar:t1.jpg": "",
        "b.tar:t2.jpg": "",
        "c.tar": "unreadable",
        "good.png": "duplicate_key",
        "small.png": "resolution",
        "twin_a.jpg": "",
        "twin_b.jpg": "duplicate_file",
        "pixels_a.bmp": "",  # the larger file
        "pixels_b.png": "duplicate_pixels",
        "near_half.png": "duplicate_near",
        "near_large.png": "",
        "empty.jpg": "unreadable",
        "broken.jpg": "unreadable",
        "no_picture.jpg": "unreadable",
        "clip.mp4": "no_picture",
    }
    rows = {Path(source).name: row for source, row in rows_of(undisturbed).items()}
    assert rows["small.png"]["detail"] == "resolution 63 is below 64" and rows["small.png"]["colour"] is None
    assert rows["near_half.png"]["detail"].startswith(f"as {inputs[1]}/near_large.png (")
    assert rows["b.tar:t2.jpg"]["captions"] == ["second"] and rows["good.png"]["captions"] == ["云 clouds"]
    assert (rows["near_half.png"]["height"], rows["near_half.png"]["width"]) == (80, 64)
    assert all(row["aesthetic"] is None and row["text"] is None for row in rows.values())


def test_the_page_says_what_was_off(undisturbed):
    page = (undisturbed / "report.html").read_text(encoding="utf-8")
    assert "Filter aesthetic was off: no weight files were given" in page
    assert "Filter text and colour was off: they judge pictures below the aesthetic score" in page
    assert "Dropped: duplicate near" in page and page.count("data:image/png") == 6 + 5  # kept, and readable others


def test_the_page_in_a_browser(undisturbed, browser):
    with browser.page(undisturbed / "report.html") as page:
        assert page.errors == [] and page.requests == [] and page.overflow() == 0
        assert len(page.boxes("figure > svg")) == 2  # sizes and colours; no score, no text was measured
        # A square for each picture, as wide as its card allows.
        assert min(box.width for box in page.boxes(".card img")) > 80
        headings = page.texts("h2")
    assert headings[:3] == ["Funnel", "Scores", "Kept"] and "Dropped: duplicate file" in headings


def test_kept_tars_hold_the_files_as_they_were(undisturbed):
    rows = [row for row in rows_of(undisturbed).values() if row["verdict"] == "kept"]
    tars = sorted((undisturbed / "kept").glob("*.tar"))
    assert [path.name for path in tars] == ["kept-000000.tar", "kept-000001.tar"]
    samples = list_samples(tars)
    assert {sample.key for sample in samples} == {row["key"] for row in rows} and len(samples) == 6
    by_key = {sample.key: sample for sample in samples}
    for row in rows:
        with open(row["path"], "rb") as file:
            file.seek(row["offset"])
            assert by_key[row["key"]].media.read() == file.read(row["size"])
        assert list(by_key[row["key"]].captions()) == row["captions"]


def test_any_key_and_source_survive_the_tars(tmp_path):
    rows = {}
    for number, (key, source) in enumerate(
        {"img_0001.jpg": "img_0001.jpg", "cat.001": "https://host/x", "cat.002": "https://host/y.html"}.items()
    ):
        (tmp_path / f"{number}.png").write_bytes(encoded(clouds(number)))
        rows[key] = {"path": f"{number}.png", "key": key, "kind": "image", "source": source, "caption": f"No {number}"}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows.values())))
    output = tmp_path / "out"
    main(["--inputs", json.dumps([str(tmp_path / "rows.jsonl")]), "--output", str(output), "--kept", "tars", *SMALL])
    samples = {sample.key: sample for sample in list_samples((output / "kept").glob("*.tar"))}
    assert {key: [row["caption"]] for key, row in rows.items()} == {
        key: list(sample.captions()) for key, sample in samples.items()
    }
    for key, row in rows.items():
        assert samples[key].media.read() == (tmp_path / row["path"]).read_bytes() and samples[key].kind == "image"


def contents(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_any_number_of_jobs_and_processes_gives_the_same_bytes(inputs, undisturbed, tmp_path, monkeypatch, capsys):
    options = ["--inputs", json.dumps(inputs), "--output", str(tmp_path / "out"), "--kept", "tars",
               "--pictures_per_tar", "3", "--piece_size", "4", "--filters.min_side", "64"]  # fmt: skip
    main([*options, "--shard_index", "1", "--num_shards", "2", "--workers", "2"])
    assert "shard 1 of 2 is measured; when all are, run --stage decide" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"3 of 6 parts are missing \(0, 2, 4\)"):
        main([*options, "--stage", "decide", "--workers", "0"])
    main([*options, "--shard_index", "0", "--num_shards", "2", "--workers", "0"])
    main([*options, "--stage", "decide"])
    for task in (1, 0):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "0")
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
        main([*options, "--stage", "write"])
    found, expected = contents(tmp_path / "out"), contents(undisturbed)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def test_the_lists(inputs, undisturbed, tmp_path):
    kept = [row for row in rows_of(undisturbed).values() if row["verdict"] == "kept"]
    for kind in ("jsonl", "parquet"):
        main(["--inputs", json.dumps(inputs), "--output", str(tmp_path), "--kept", kind, *SMALL])
        listed = list_samples([tmp_path / f"kept.{kind}"])
        assert {sample.key for sample in listed} == {row["key"] for row in kept}
        assert all(decode_picture(sample.media.read()).shape[2] == 3 for sample in listed)
    again, inputs = tmp_path / "again", json.dumps([str(tmp_path / "kept.parquet")])
    main(["--inputs", inputs, "--output", str(again), "--piece_size", "4", *SMALL])
    assert [(row["key"], row["verdict"], row["captions"]) for row in rows_of(again).values()] == [
        (row["key"], "kept", row["captions"]) for row in kept
    ]
    whole = list_samples([tmp_path / "rows.parquet"])
    assert [sample.key for sample in whole] == [sample.key for sample in listed]


def test_aesthetic_scores_and_rescue(tmp_path):
    """Photographs and a page of text, with a threshold in the middle of the scores that plain torch gives."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    names = ("astronaut", "cameraman", "fig", "hens", "macaw")
    for name in names:
        content = (ROOT / "examples" / "media" / "images" / f"{name}.jpg").read_bytes()
        (pictures / f"{name}.jpg").write_bytes(content)
    (pictures / "page.png").write_bytes(encoded(lines(9, 300) // np.array([1, 2, 2], dtype=np.uint8)))
    clip, head = save_clip(tmp_path / "clip"), head_weights("improved")
    torch.save(head, tmp_path / "head.pth")
    decoded = {path.name: decode_picture(path.read_bytes()) for path in sorted(pictures.iterdir())}
    weights = CLIPVisionModelWithProjection.from_pretrained(clip).state_dict()
    squares = np.stack([clip_square(picture, SIDE) for picture in decoded.values()])
    expected = dict(zip(decoded, plain_scores(squares, weights, head).tolist(), strict=True))
    threshold = sorted(expected.values())[-2] - 1e-4
    arguments = [
        "--inputs", json.dumps([str(pictures)]), "--output", str(tmp_path / "out"), "--filters.min_side", "200",
        "--aesthetic.clip", str(clip), "--aesthetic.head", str(tmp_path / "head.pth"), "--aesthetic.batch_size", "3",
        "--filters.min_aesthetic", str(threshold), "--workers", "0",
    ]  # fmt: skip
    main([*arguments, "--stage", "measure"])
    main([*arguments, "--stage", "decide", "--aesthetic.device", "cuda"])  # which a job that merges need not have
    rows = {Path(source).name: row for source, row in rows_of(tmp_path / "out").items()}
    for name, picture in decoded.items():
        row = rows[name]
        assert row["aesthetic"] == pytest.approx(expected[name], abs=1e-5)  # as in test_aesthetic.py
        is_above, is_coloured = expected[name] >= threshold, colour_spread(picture) >= 3
        share = None if is_above or not is_coloured else text_share(picture, 512)
        assert row["text"] == share
        is_rescued = share is not None and share <= 0.05
        assert (row["verdict"] == "kept", row["rescued"]) == (is_above or is_rescued, is_rescued)
    assert sum(row["rescued"] for row in rows.values()) >= 2
    assert "Kept although below the aesthetic score" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path):
    """The main process is killed with its workers at work; the second start keeps the pieces that were finished."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for seed in range(40):
        (pictures / f"p{seed}.jpg").write_bytes(encoded(clouds(seed, 520, 520), "JPEG", quality=90))
    options = ["--inputs", json.dumps([str(pictures)]), "--piece_size", "2", "--kept", "tars"]
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.curate_images", *options, "--output", str(killed), "--workers", "1"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    first = killed / "parts" / "part-000000.parquet"
    while not first.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    made = {path.name: path.stat().st_mtime_ns for path in first.parent.glob("part-*.parquet")}
    assert 1 <= len(made) < 20
    (killed / "parts" / ".part-000019.parquet.0123abcd.tmp").write_bytes(b"half")
    for output in (killed, tmp_path / "undisturbed"):
        main([*options, "--output", str(output), "--workers", "0"])
    found, expected = contents(killed), contents(tmp_path / "undisturbed")
    assert found.keys() == expected.keys()
    differing = {name for name in found if found[name] != expected[name]}
    assert differing <= {"report.html"}  # its title is the folder's name
    assert {name: (first.parent / name).stat().st_mtime_ns for name in made} == made


@pytest.mark.parametrize(
    "options, message",
    [
        (["--overwrite", "true", "--shard_index", "0", "--num_shards", "2"], "overwrite with stage all and 2 shards"),
        (["--stage", "write", "--kept", "tars"], "made_by.json is missing: run the stage decide with kept: tars first"),
        (["--stage", "write"], "stage write with kept: jsonl"),
        (["--aesthetic.clip", "x"], "aesthetic.clip is given without aesthetic.head"),
        (["--piece_size", "0"], "piece_size 0: must be at least 1"),
        (["--workers", "-1"], "workers -1"),
    ],
)
def test_bad_options(options, message, inputs, tmp_path):
    with pytest.raises(InputError, match=message):
        main(["--inputs", json.dumps(inputs), "--output", str(tmp_path / "out"), *options])


def test_other_options_refuse_and_thresholds_of_duplicates_do_not(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded(clouds(0)))
    options = ["--inputs", json.dumps([str(tmp_path / "in")]), "--output", str(tmp_path / "out"), "--workers", "0"]
    main([*options, "--filters.min_side", "64"])
    main([*options, "--filters.min_side", "64", "--filters.max_hash_distance", "null"])
    with pytest.raises(InputError, match="holds a table made with filters"):
        main([*options, "--filters.min_side", "97"])
    main([*options, "--filters.min_side", "97", "--overwrite", "true"])
    (row,) = rows_of(tmp_path / "out").values()
    assert row["reason"] == "resolution"
    assert (tmp_path / "out" / "kept.jsonl").read_bytes() == b""


def test_a_picture_that_changed_is_not_written_as_if_it_were_the_one_measured(tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.bmp"
    path.write_bytes(encoded(clouds(0), "BMP"))
    options = ["--inputs", json.dumps([str(tmp_path / "in")]), "--output", str(tmp_path / "out"), *SMALL]
    options += ["--kept", "tars"]
    main([*options, "--shard_index", "0", "--num_shards", "2"])
    main([*options, "--stage", "decide"])
    path.write_bytes(encoded(clouds(1), "BMP"))
    with pytest.raises(InputError, match="a.bmp has changed since it was measured"):
        main([*options, "--stage", "write"])


def test_tars_of_two_tables_are_not_mixed(tmp_path):
    (tmp_path / "in").mkdir()
    large = encoded(clouds(1, 160, 128))
    half = encoded(np.asarray(decode_picture(large))[::2, ::2])
    for name, content in {"a": encoded(clouds(0)), "half": half, "large": large}.items():
        (tmp_path / "in" / f"{name}.png").write_bytes(content)
    output = tmp_path / "out"
    options = ["--inputs", json.dumps([str(tmp_path / "in")]), "--output", str(output), *SMALL]
    write = ["--kept", "tars", "--pictures_per_tar", "1", "--stage", "write", "--num_shards", "2", "--shard_index"]
    main([*options, "--kept", "tars", "--pictures_per_tar", "1"])
    (output / "kept" / "kept-000000.tar").unlink()
    (output / "kept" / ".kept-000000.tar.0123.tmp").write_bytes(b"of a killed job")
    main([*options, "--filters.max_hash_distance", "null", "--stage", "decide"])
    with pytest.raises(InputError, match=r"kept/made_by.json is the plan of another table than .*rows.parquet"):
        main([*options, *write, "0"])
    assert [path.name for path in (output / "kept").glob("*.tar")] == ["kept-000001.tar"]
    main([*options, "--stage", "decide"])
    main([*options, *write, "1"])
    assert len(list((output / "kept").glob(".*.tmp"))) == 1, "it may be of a job that is running"
    main([*options, *write, "0"])
    assert sorted(path.name for path in (output / "kept").iterdir()) == [
        "kept-000000.tar",
        "kept-000001.tar",
        "made_by.json",
    ]


def test_an_empty_table(tmp_path):
    (tmp_path / "none.jsonl").write_bytes(b"")
    with pytest.raises(InputError, match="none.jsonl hold nothing"):
        main(["--inputs", json.dumps([str(tmp_path / "none.jsonl")]), "--output", str(tmp_path / "out")])


def test_nothing_readable_is_an_error_with_a_table(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"x")
    with pytest.raises(InputError, match="none of the 1 inputs .* is a readable picture"):
        main(["--inputs", json.dumps([str(tmp_path / "in")]), "--output", str(tmp_path / "out"), "--workers", "0"])
    assert len(rows_of(tmp_path / "out")) == 1

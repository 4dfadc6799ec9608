"""tools/tokenize_vision.py as several jobs: what they write together does not depend on how many they are."""

import json
import shutil
import tarfile
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ext.config import InputError
from megatron_ext.data.sources import TokenizedFolder
from megatron_ext.vision.shards import CodesFolder
from tests.unit.vision.tokenized import contents, skipped, tree
from tools import tokenize_vision


@pytest.fixture
def inputs(arguments, media, tmp_path):
    """Arguments for a folder, two tars of which the second repeats a key, and two manifests, in shards of two."""
    for name, keys in {"first": "ab", "second": "ac"}.items():
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for key in keys:
                tar.add(media / f"{key}.png", f"{name}/{key}.png" if key != "a" else "repeated.png")
    rows = [{"path": str(media / f"{key}.png"), "key": f"row.{key}", "caption": f"Row {key}."} for key in "abce"]
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(map(json.dumps, [*rows, rows[0], {**rows[1], "key": "gone", "path": "x.png"}]))
    )
    pq.write_table(
        pa.table(
            {
                "path": [str(media / f"{key}.png") for key in "abc"],
                "key": ["kept", "dropped", "v"],
                "verdict": ["kept", "dropped", "kept"],
            }
        ),
        tmp_path / "rows.parquet",
    )
    names = ("media", "*.tar", "rows.jsonl", "rows.parquet")
    listed = ",".join(str(tmp_path / name) for name in names)
    return [*arguments, f"--inputs=[{listed}]", "--shard_size=2"]


def run_jobs(arguments, output, count, workers):
    arguments = [*arguments, f"--output={output}", f"--decode_workers={workers}"]
    for index in reversed(range(count)):
        tokenize_vision.main([*arguments, f"--shard_index={index}", f"--num_shards={count}"])
    if count > 1:
        tokenize_vision.main([*arguments, "--merge_only=true"])
    return tree(output)


def test_the_result_does_not_depend_on_jobs_or_workers(inputs, tmp_path, capsys):
    whole = run_jobs(inputs, tmp_path / "1", 1, 0)
    assert run_jobs(inputs, tmp_path / "2", 2, 2) == whole
    assert run_jobs(inputs, tmp_path / "5", 5, 0) == whole
    assert "job 3 of 5 is finished" in capsys.readouterr().out
    folder = tmp_path / "1"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [shard["name"] for shard in manifest["shards"]] == [
        *(f"codes-00000-0000{chunk}.tar" for chunk in range(3)),
        "codes-00001-00000.tar",
        "codes-00002-00000.tar",
        "codes-00003-00000.tar",
        "codes-00003-00001.tar",
        "codes-00004-00000.tar",
    ]
    keys = [sample.key for sample in TokenizedFolder.open(folder).samples()]
    assert keys == [
        "a",
        "b",
        "c",
        "e",
        "v",
        "first/b",
        "repeated",
        "second/c",
        "row.a",
        "row.b",
        "row.c",
        "row.e",
        "kept",
    ]
    reasons = skipped(folder)
    assert set(reasons) == {"d", "repeated", "row.a", "gone", "v"} and manifest["skipped"] == 5
    assert reasons["repeated"] == "its key is also that of a sample in codes-00001-00000"
    assert reasons["row.a"] == "its key is also that of a sample in codes-00003-00000"
    assert reasons["v"] == "its key is also that of a sample in codes-00000-00002"
    assert manifest["samples"] == {"image": 12, "video": 1}


def test_the_manifest_waits_for_all_jobs(inputs, tmp_path):
    output = tmp_path / "codes"
    tokenize_vision.main([*inputs, "--shard_index=1", "--num_shards=2"])
    assert not (output / "manifest.json").exists()
    with pytest.raises(InputError, match=r"shards are not finished \(codes-00000-00000, .*run their jobs again"):
        tokenize_vision.main([*inputs, "--merge_only=true"])
    tokenize_vision.main(inputs)  # one job finds what the other did
    assert run_jobs(inputs, tmp_path / "whole", 1, 0) == tree(output)


def test_a_task_of_slurm_is_a_job(inputs, tmp_path, monkeypatch, capsys):
    for task in (4, 5, 6):
        for name, value in {"ID": task, "MIN": 4, "COUNT": 3}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        tokenize_vision.main(inputs)
        assert f"job {task - 4} of 3 is finished" in capsys.readouterr().out
    tokenize_vision.main([*inputs, "--merge_only=true"])
    assert len(contents(tmp_path / "codes")) == 14 - 1


def test_only_what_changed_is_made_anew(inputs, media, tmp_path, monkeypatch):
    output = tmp_path / "codes"
    tokenize_vision.main(inputs)
    (media / "a.txt").write_text("Another caption.")  # a part of the first chunk
    with pytest.raises(InputError, match="made with inputs_sha256"):
        tokenize_vision.main(inputs)
    tokenized = []
    original = tokenize_vision.tokenize

    def counted(decoded, *rest, **options):
        samples = original(decoded, *rest, **options)
        tokenized.append([sample.key for sample in samples])
        return samples

    monkeypatch.setattr(tokenize_vision, "tokenize", counted)
    tokenize_vision.main([*inputs, "--overwrite=true"])
    # The caption is also that of the row `kept`. Chunks that lost a sample to another's key: the other might be gone.
    assert tokenized == [["a", "b"], ["repeated", "second/c"], ["row.a"], ["kept"], ["v"]]
    fresh = run_jobs(inputs, tmp_path / "fresh", 1, 0)
    assert fresh == tree(output)
    assert contents(output)["a"][1]["captions"] == ["Another caption.", "图片"]


def test_batches_do_not_change_codes(inputs, tmp_path):
    tokenize_vision.main([*inputs, "--shard_size=100"])
    tokenize_vision.main([*inputs, "--shard_size=100", "--batch_size=1", f"--output={tmp_path / 'single'}"])
    many, single = contents(tmp_path / "codes"), contents(tmp_path / "single")
    assert list(many) == list(single)
    # The latents of a batch differ from one picture's by up to 1e-5 (docs/numerics.md): a tie could fall otherwise.
    assert all(np.array_equal(many[key][0], single[key][0]) for key in many)


def test_more_jobs_than_inputs(arguments, media, tmp_path):
    shutil.rmtree(tmp_path / "codes", ignore_errors=True)
    for index in range(3):
        tokenize_vision.main([*arguments, f"--shard_index={index}", "--num_shards=3"])
    tokenize_vision.main([*arguments, "--merge_only=true"])
    assert list(contents(tmp_path / "codes")) == ["a", "b", "c", "e", "v"]


def test_nothing_is_left_of_what_is_overwritten(arguments, tmp_path):
    tokenize_vision.main([*arguments, "--shard_size=2"])
    (tmp_path / "codes/.codes-00000-00001.tar.0123abcd.tmp").write_bytes(b"of a killed program")
    tokenize_vision.main([*arguments, "--shard_size=100", "--overwrite=true"])
    assert tree(tmp_path / "codes") == run_jobs([*arguments, "--shard_size=100"], tmp_path / "fresh", 1, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_inputs_are_listed_when_their_turn_comes(arguments, media, tmp_path, monkeypatch, capsys, workers):
    for number in range(4):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for sample in range(9):
                tar.add(media / "a.png", f"{number}{sample}.png")
    lists, write, held, events = tokenize_vision.listing_of, CodesFolder.write, weakref.WeakSet(), []
    chunks_of_job = tokenize_vision.chunks_of_job

    def listed(part):
        events.append(f"list {part.paths[0].stem}")
        return lists(part)

    def written(self, chunk, samples, skipped):
        events.append(f"write {chunk.part}")
        return write(self, chunk, samples, skipped)

    def watched(*options):
        for work in chunks_of_job(*options):
            held.update(work.entries)
            events.append(f"hold {len(held)}")
            yield work

    for where, name, function in (
        (tokenize_vision, "listing_of", listed),
        (CodesFolder, "write", written),
        (tokenize_vision, "chunks_of_job", watched),
    ):
        monkeypatch.setattr(where, name, function)
    arguments = [*arguments, f"--inputs=[{tmp_path}/?.tar]", f"--decode_workers={workers}"]
    tokenize_vision.main(arguments)
    # The next tar is listed before a shard is written, and no other.
    steps = [event for event in events if "hold" not in event]
    assert sorted(steps) == sorted(f"{verb} {number}" for verb in ("list", "write") for number in range(4))
    place = {event: number for number, event in enumerate(steps)}
    for number in range(1, 4):
        assert place[f"list {number}"] < place[f"write {number - 1}"]
    for number in range(2, 4):
        assert place[f"write {number - 2}"] < place[f"list {number}"]
    # One sample of the chunk before may still be in a hand.
    assert max(int(event.split()[1]) for event in events if "hold" in event) <= 2 * 9 + 1
    assert "tokenized 36 samples" in capsys.readouterr().out
    tokenize_vision.main(arguments)
    assert "is finished and nothing has changed: reused" in capsys.readouterr().out

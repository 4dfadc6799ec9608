"""Shards, merged, are what one run gives; nothing half-merged is taken for whole."""

import itertools
import json
import os
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_ext.config import InputError, load
from megatron_ext.data import DocumentDataset
from megatron_ext.data.index_file import read_lengths, write_index
from megatron_ext.data.manifest import is_whole
from megatron_ext.data.merge import merge_shards
from megatron_ext.data.options import PreprocessConfig
from megatron_ext.data.preprocess import Work
from megatron_ext.data.sidecar import Sidecar, write_sidecar
from tests.unit.data.samples import (
    CODEBOOK_SIZE,
    VISION_TOKENIZER,
    make_vocabulary,
    random_dataset,
    write_tokenized_folder,
)
from tools import merge_datasets, preprocess_data


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, text_model) -> Path:
    """Media of four shards, rows, texts of three files; one caption and one text cannot be used."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    for name, count in (("a", 30), ("b", 4)):
        media = {
            f"{name}{number}": (rng.integers(0, CODEBOOK_SIZE, (2, 3)), [f"cat {number}", "two dogs", " "])
            for number in range(count)
        }
        media[f"{name}_bad"] = (rng.integers(0, CODEBOOK_SIZE, (3, 2, 3)), ["half \ud83d"])
        write_tokenized_folder(folder / name, media)
    rows = [{"content": ["see", {"image": f"a{n}"}, "and", {"image": f"b{n % 4}"}]} for n in range(9)]
    bad = {"key": "bad", "media": "none"}
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, bad])))
    (folder / "rows2.jsonl").write_text(json.dumps(bad))
    for number in range(3):
        (folder / f"{number}.txt").write_text(
            "\n\n".join(f"text {line} of {number}" for line in range(20 * number + 1))
        )
    (folder / "1.txt").write_bytes(b"fine\n\n\xff\n")
    (folder / "text.model").write_bytes(text_model)
    return folder


def arguments(folder: Path, output: Path, **options) -> list[str]:
    given = {
        "vocab.layout": "custom",
        "vocab.text_tokenizer": folder / "text.model",
        "vocab.codebook_size": CODEBOOK_SIZE,
        "vision": [str(folder / "a"), str(folder / "b")],
        "rows": [str(folder / "rows*.jsonl")],
        "row_media": [str(folder / "a"), str(folder / "b")],
        "text": [str(folder / "*.txt")],
        "output_prefix": output,
        "valid_fraction": 0.3,
        "captions_per_sample": 1,
        "empty_caption_probability": 0.2,
        "max_bad_fraction": 0.5,
        **options,
    }
    return [f"--{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in given.items()]


def files(folder: Path, prefix: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0].startswith((f"{prefix}_", f"{prefix}."))
    }


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> dict[str, bytes]:
    """What one run writes."""
    folder = tmp_path_factory.mktemp("whole")
    preprocess_data.main(arguments(inputs, folder / "set"))
    return files(folder, "set")


@pytest.mark.parametrize(("num_shards", "workers"), [(3, 1), (8, 1), (2, 2), (1, 3)])
def test_merged_shards_are_what_one_run_gives(inputs, whole, tmp_path, num_shards, workers, capsys):
    for shard in reversed(range(num_shards)):
        more = {"shard_index": shard, "num_shards": num_shards, "workers": workers}
        preprocess_data.main(arguments(inputs, tmp_path / "set", **more))
    if num_shards > 1:
        merge_datasets.main(["--output_prefix", str(tmp_path / "set")])
        assert f"skipped {inputs}/b/codes-00001.tar: b_bad: a caption is not UTF-8" in capsys.readouterr().out
    found = files(tmp_path, "set")
    assert found.keys() == whole.keys() and len(whole) == 2 * 6 + 1
    assert [name for name in whole if found[name] != whole[name]] == []
    assert not list(tmp_path.rglob("*.partial"))
    dataset = IndexedDataset(str(tmp_path / "set_train"))
    assert len(dataset) > 50 and len(dataset[len(dataset) - 1])


def test_shards_follow_slurm_s_array(inputs, whole, tmp_path, monkeypatch):
    for task in range(2):
        for name, value in {"ID": task + 5, "MIN": 5, "COUNT": 2, "STEP": 1}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        preprocess_data.main(arguments(inputs, tmp_path / "set"))
    merge_datasets.main(["--output_prefix", str(tmp_path / "set"), "--num_shards", "2"])
    assert files(tmp_path, "set") == whole


def test_finished_work_is_not_done_again(inputs, tmp_path, capsys):
    def run(**options) -> bool:
        preprocess_data.main(arguments(inputs, tmp_path / "set", **options))
        return "nothing has changed: reused" in capsys.readouterr().out

    shard = {"shard_index": 0, "num_shards": 2}
    assert [run(**shard) for _ in range(2)] == [False, True]
    assert run(**shard, max_bad_fraction=0.6) and run(**shard, workers=2)  # neither shapes the documents
    assert not run(**shard, seed=5) and not run(**shard, seed=5, overwrite=True)
    (tmp_path / "set-00000-of-00002_train.bin").write_bytes(b"")
    assert not run(**shard, seed=5)
    with pytest.raises(InputError, match="1 of 2 shards of .*set are not finished: 1"):
        merge_datasets.main(["--output_prefix", str(tmp_path / "set")])
    run(shard_index=1, num_shards=2)
    with pytest.raises(InputError, match="of other inputs or with other options than other shards"):
        merge_datasets.main(["--output_prefix", str(tmp_path / "set")])
    run(shard_index=1, num_shards=2, seed=5)
    for expected in (False, True):
        merge_datasets.main(["--output_prefix", str(tmp_path / "set")])
        assert ("nothing has changed: reused" in capsys.readouterr().out) is expected
    run(shard_index=0, num_shards=3)
    with pytest.raises(InputError, match=r"num_shards \[2, 3\]"):
        merge_datasets.main(["--output_prefix", str(tmp_path / "set")])


def test_datasets_are_joined_as_megatron_core_joins_them(tmp_path, vocabulary):
    prefixes = [random_dataset(tmp_path / f"part{number}", vocabulary, 20 + number, number) for number in range(3)]
    merge_datasets.main(["--inputs", json.dumps(list(map(str, prefixes))), "--output_prefix", str(tmp_path / "all")])
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for prefix in prefixes:
        builder.add_index(str(prefix))
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"all{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    joined = DocumentDataset(tmp_path / "all", vocabulary)
    assert all(joined.check_files().values()) and joined.manifest.vision_tokenizer == VISION_TOKENIZER
    parts = [DocumentDataset(prefix, vocabulary) for prefix in prefixes]
    documents = [(part, number) for part in parts for number in range(len(part))]
    for number, (part, own) in enumerate(documents):
        assert joined.sidecar.key(number) == part.sidecar.key(own)
        np.testing.assert_array_equal(joined.ids(number), part.ids(own))
        np.testing.assert_array_equal(joined.sidecar.spans.of(number), part.sidecar.spans.of(own))


def test_what_cannot_be_joined_is_refused(tmp_path, vocabulary, text_model):
    def refused(message: str, *prefixes: Path, output: str = "all"):
        with pytest.raises(InputError, match=message):
            merge_datasets.main(
                ["--inputs", json.dumps(list(map(str, prefixes))), "--output_prefix", str(tmp_path / output)]
            )
        assert not list(tmp_path.glob("all*")) and not list(tmp_path.glob("*.partial"))

    one, two = (random_dataset(tmp_path / name, vocabulary) for name in ("one", "two"))
    refused("none.manifest.json is missing", one, tmp_path / "none")
    refused("output_prefix .* is one of inputs", one, two, output="two")
    refused("preprocess all data with one", one, random_dataset(tmp_path / "other", make_vocabulary(text_model, 51)))
    damaged = bytearray((tmp_path / "two.bin").read_bytes())
    damaged[5] ^= 1
    (tmp_path / "two.bin").write_bytes(damaged)
    refused("two.bin does not have its manifest's sha256", one, two)
    (tmp_path / "two.idx").unlink()
    refused("two: .bin, .idx, .spans.npz are not as its manifest says", one, two)
    with pytest.raises(InputError, match="there is no finished shard"):
        merge_datasets.main(["--output_prefix", str(tmp_path / "nothing")])


def test_index_and_sidecar_take_little_memory(tmp_path, monkeypatch):
    """Of 300,000 documents in 3 parts, whose arrays are 11 MB: blocks of 2,048 documents are at hand."""
    for module in ("index_file", "sidecar"):
        monkeypatch.setattr(f"megatron_ext.data.{module}._CHUNK", 2048)
    ends = np.arange(100_001)
    part = Sidecar(np.ones(100_000, np.uint8), ends, np.ones(100_000, np.uint8), ends, np.ones((100_000, 2), np.int32))
    lengths = np.full(100_000, 5, np.int32)
    tracemalloc.start()
    write_index(tmp_path / "x.idx", [lengths] * 3)
    write_sidecar(tmp_path / "x.npz", [part] * 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000  # measured: 0.1 MB
    assert Sidecar.read(tmp_path / "x.npz").span_offsets.tolist() == list(range(300_001))
    assert read_lengths(tmp_path / "x.idx").tolist() == [5] * 300_000


def killed_at(moment: int, action) -> bool:
    """Run `action` in a process that kills itself before its `moment`-th change of a folder; False: it never came."""
    child = os.fork()
    if not child:
        left = itertools.count(moment, -1)

        def or_die(change):
            def changed(*arguments, **options):
                if next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*arguments, **options)

            return changed

        for name in ("replace", "unlink", "fsync", "rmdir", "mkdir"):
            setattr(os, name, or_die(getattr(os, name)))
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path, text_model):
    """What is there at that moment is whole or absent; done again, it is what an undisturbed run gives."""
    (tmp_path / "text.model").write_bytes(text_model)
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("\n\n".join(f"text {line} of {number}" for line in range(20)))
    given = arguments(tmp_path, tmp_path / "set", vision=[], rows=[], row_media=[])
    work = Work.find(load(PreprocessConfig, given))
    for shard in range(2):
        Work.find(load(PreprocessConfig, [*given, f"--shard_index={shard}", "--num_shards=2"])).do(lambda size: None)

    def merge():
        merge_shards(tmp_path / "set", 2, True, lambda size: None)

    def one_run():
        work.do(lambda size: None)

    one_run()
    whole = files(tmp_path, "set")
    for action, step in ((merge, 2), (one_run, 5)):
        for moment in range(0, 300, step):
            was_killed = killed_at(moment, action)
            for split in ("train", "valid"):
                prefix = tmp_path / f"set_{split}"
                assert not prefix.with_name(f"set_{split}.idx").exists() or is_whole(prefix)
            if moment % 10 == 0 or not was_killed:
                action()
                assert files(tmp_path, "set") == whole
            if not was_killed:
                break
        assert moment > 20 and not was_killed and not list(tmp_path.glob("*.partial"))

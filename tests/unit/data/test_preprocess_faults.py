"""Faults while datasets are made: what is skipped is named, nothing torn is left, a restart ends as if undisturbed."""

import io
import json
import os
import resource
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.config import BadSamples, InputError, run_program
from megatron_ext.data import preprocess
from megatron_ext.data.encoder import Encoder
from tests.support.processes import children_of, is_running
from tests.unit.data.samples import write_tokenized_folder
from tests.unit.data.test_programs import arguments, decoded
from tools import merge_datasets, preprocess_data


@pytest.fixture
def texts(tmp_path, text_model) -> Path:
    (tmp_path / "text.model").write_bytes(text_model)
    for number in range(3):
        lines = (f"text {line} of file {number}" for line in range(1000))
        (tmp_path / f"{number}.txt").write_text("\n".join(lines))
    return tmp_path


def only_texts(folder: Path, **options) -> list[str]:
    return arguments(folder, **{"vision": [], "text": [str(folder / "*.txt")], "text_unit": "line", **options})


def test_a_key_that_comes_twice_in_a_shard_is_skipped_by_name(tmp_path, text_model, capsys):
    (tmp_path / "text.model").write_bytes(text_model)
    folder = write_tokenized_folder(
        tmp_path / "codes", {f"p{n}": (np.full((1, 1), n), [f"number {n}"]) for n in range(6)}
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    with tarfile.open(folder / "codes-00000.tar", "a") as tar:
        for _ in range(2):  # also right after itself
            for suffix, content in (
                ("codes.npy", codes(9)),
                ("json", b'{"key": "p1", "kind": "image", "captions": ["x"]}'),
            ):
                member = tarfile.TarInfo(f"p1.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    manifest["samples"]["image"] += 2
    manifest["shards"][0]["samples"] += 2
    (folder / "manifest.json").write_text(json.dumps(manifest))
    preprocess_data.main(arguments(tmp_path, text=[], caption_position="before", max_bad_fraction=0.5))
    place = f"{folder}/codes-00000.tar: p1"
    printed = capsys.readouterr().out
    assert all(f"skipped {place} (sample {number}): its key has come before" in printed for number in (4, 5))
    assert [segments[0] for key, segments in decoded(tmp_path / "out/set_train") if key == "p1"] == ["number 1"]
    with pytest.raises(InputError, match="vision has .*codes twice"):
        preprocess_data.main(arguments(tmp_path, vision=[str(folder), f"{tmp_path}/../{tmp_path.name}/codes"], text=[]))


def codes(value: int) -> bytes:
    content = io.BytesIO()
    np.save(content, np.full((1, 1), value, np.uint16))
    return content.getvalue()


def test_too_many_bad_samples_stop_the_work_before_its_end(texts, tmp_path, monkeypatch):
    """10,000 texts of which every 20th is none: plain after the first batch, certain only after 2,000 of them."""
    (tmp_path / "0.txt").write_bytes(b"\n".join(b"\xff" if n % 20 == 0 else b"fine" for n in range(10_000)))
    seen = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda *given: seen.append(encode(*given)) or seen[-1])
    with pytest.raises(
        InputError, match=r"52 of the first 1,024 samples cannot be used, more than max_bad_fraction 0.01"
    ):
        preprocess_data.main(only_texts(texts))
    assert len(seen) == 1 and not list((tmp_path / "out").iterdir())


def test_when_bad_samples_are_too_many():
    def stops(bad: int, seen: int, total: int | None, fraction: float = 0.01) -> bool:
        samples = BadSamples(fraction)
        for number in range(bad):
            samples.add(str(number), "why")
        try:
            samples.check_early(seen, total)
        except InputError:
            return True
        return False

    assert not stops(999, 999, None) and stops(21, 1000, None) and not stops(20, 1000, None)
    assert not stops(100, 100, 10_000) and stops(101, 101, 10_000)
    assert stops(1, 1, None, 0.0) and stops(1, 1, 5, 0.0) and not stops(0, 1, None, 0.0)
    assert not stops(5000, 5000, None, 1.0)


def test_bad_samples_of_one_source_are_several():
    samples = BadSamples(0.5)
    for reason in ("cut off", "cut off", "empty"):
        samples.add("a.tar", reason)
    assert samples.lines() == ["skipped a.tar: cut off"] * 2 + ["skipped a.tar: empty"]
    with pytest.raises(InputError, match=r"3 of 5 samples .* \(a.tar: cut off; a.tar: cut off; a.tar: empty\)"):
        samples.check(5)


def test_rows_of_one_key_in_several_files_are_each_named(texts, capsys):
    for name in ("a", "b"):
        (texts / f"{name}.jsonl").write_text('{"key": "same", "media": "x"}\n{"question": "x"}')
    options = {"rows": [str(texts / "*.jsonl")], "max_bad_fraction": 1}
    preprocess_data.main(only_texts(texts, **options))
    report = json.loads((texts / "out/set.report.json").read_text())
    assert [source for source, _ in report["skipped"]] == [
        f"{texts}/{name}.jsonl{row}" for name in ("a", "b") for row in (": same", "#2")
    ]


def ends_on_a_full_disk(program, arguments_: list[str], size: int) -> str:
    """What the program says where no file may grow beyond `size` bytes: like a full disk, an error of the system."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        sys.stdout, sys.stderr = open(os.devnull, "w"), os.fdopen(write, "w")  # pytest's are files: they may not grow
        try:
            run_program(program.main, arguments_)
        except SystemExit as end:
            os._exit(end.code or 0)
        os._exit(1)
    os.close(write)
    with os.fdopen(read) as said:
        text = said.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    return text


def test_a_full_disk_is_told_and_leaves_nothing(texts, tmp_path):
    for size in (0, 5_000, 50_000):
        line = ends_on_a_full_disk(preprocess_data, only_texts(texts), size)
        assert (
            line.startswith("error: output_prefix: cannot write") and "File too large" in line and "make room" in line
        )
        assert line.count("\n") == 1 and not list((tmp_path / "out").iterdir())
    for shard in range(2):
        preprocess_data.main(only_texts(texts, shard_index=shard, num_shards=2))
    before = set((tmp_path / "out").rglob("*"))
    merge = ["--output_prefix", str(tmp_path / "out/set")]
    for size in (50_000, 100_000):
        assert "error: output_prefix: cannot write" in ends_on_a_full_disk(merge_datasets, merge, size)
        assert set((tmp_path / "out").rglob("*")) == before
    merge_datasets.main(merge)


def wait_for(condition, seconds: float = 30):
    """What `condition` gives, once it gives something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise TimeoutError


def begin(arguments_: list[str]) -> tuple[int, list[int]]:
    """(pid, pids of its two workers) of a preprocessing that has begun to encode and reads slowly."""

    def slowly(batches):
        for batch in batches:
            yield batch
            time.sleep(0.5)

    read = preprocess.read_batches
    child = os.fork()
    if not child:
        preprocess.read_batches = lambda *given: slowly(read(*given))
        try:
            preprocess_data.main(arguments_)
        except InputError as error:
            os._exit(9 if "workers = 2: a worker process was killed" in str(error) else 1)
        os._exit(0)
    return child, wait_for(lambda: len(found := children_of(child)) == 2 and found)


@pytest.mark.parametrize("victim", ["a worker", "the program"])
def test_killed_processes(texts, tmp_path, victim):
    child, workers = begin(only_texts(texts, workers=2))
    os.kill(workers[0] if victim == "a worker" else child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (9 if victim == "a worker" else -signal.SIGKILL)
    wait_for(lambda: not any(map(is_running, workers)))
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert left == ([] if victim == "a worker" else ["set_train.bin.partial"])
    preprocess_data.main(only_texts(texts))
    preprocess_data.main(only_texts(texts, output="undisturbed/set"))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "undisturbed").iterdir())
    for name in names:
        if name != "set_train.vocabulary":
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()

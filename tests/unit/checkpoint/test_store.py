"""Checkpoint folders: whole or absent, whatever moment the writer is killed at."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_ext.checkpoint import store as store_module
from megatron_ext.checkpoint.manifest import FileRecord
from megatron_ext.checkpoint.store import CheckpointStore, check_contents, latest_checkpoint, read_metadata
from megatron_ext.config import InputError


def write_weights(folder: Path) -> None:
    (folder / "shards").mkdir()
    (folder / "shards" / "rank_0.bin").write_bytes(b"weights")


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_write_then_read(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.latest() is None
    folder = store.write(7, write_weights, {"consumed_samples": 56})
    assert folder == tmp_path / "checkpoints" / "step_00000007" == store.latest()
    assert (folder / "shards" / "rank_0.bin").read_bytes() == b"weights"
    assert read_metadata(folder) == {"consumed_samples": 56, "step": 7}
    assert names(tmp_path / "checkpoints") == {"step_00000007", "latest"}


def test_keeps_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20, 30, 40):
        store.write(step, write_weights, {})
    assert names(tmp_path) == {"step_00000030", "step_00000040", "latest"}


def test_going_back_leaves_later_checkpoints_and_never_removes_the_new_one(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.write(100, write_weights, {})
    store.write(60, write_weights, {})
    assert names(tmp_path) == {"step_00000060", "step_00000100", "latest"}
    assert store.latest().name == "step_00000060"


def test_same_step_again_replaces(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.write(5, write_weights, {"attempt": 1})
    store.write(5, write_weights, {"attempt": 2})
    assert read_metadata(store.latest())["attempt"] == 2
    assert names(tmp_path) == {"step_00000005", "latest"}


def test_keeps_some_for_good(tmp_path):
    store = CheckpointStore(tmp_path, keep=1, keep_every=4)
    for step in range(2, 14, 2):
        store.write(step, write_weights, {})
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000004", "step_00000008", "step_00000012"]


def damage(folder: Path, kind: str) -> None:
    weights, manifest = folder / "shards" / "rank_0.bin", folder / "manifest.json"
    content = json.loads(manifest.read_text())
    if kind == "missing":
        weights.unlink()
    elif kind == "short":
        weights.write_bytes(b"wei")
    elif kind == "manifest":
        manifest.unlink()
    elif kind == "version":
        manifest.write_text(json.dumps({**content, "format_version": 99}))
    elif kind == "foreign":
        manifest.write_text(json.dumps({"step": 5}))
    else:
        manifest.write_text("{")


@pytest.mark.parametrize("kind", ["missing", "short", "manifest", "version", "foreign", "garbage"])
def test_damaged_and_foreign_folders_are_refused_by_name_and_the_one_before_is_offered(tmp_path, kind):
    store = CheckpointStore(tmp_path, keep=3)
    for step in (3, 4, 5):
        store.write(step, write_weights, {})
    damage(tmp_path / "step_00000005", kind)
    damage(tmp_path / "step_00000004", "short")
    with pytest.raises(InputError, match="step_00000005") as refusal:
        latest_checkpoint(tmp_path)
    assert "\n" not in str(refusal.value)
    offered = re.search("run `(.+)`", str(refusal.value))[1]
    subprocess.run(offered, shell=True, check=True)
    assert latest_checkpoint(tmp_path).name == "step_00000003"


def test_without_another_complete_checkpoint_none_is_offered(tmp_path):
    damage(CheckpointStore(tmp_path, keep=1).write(5, write_weights, {}), "short")
    with pytest.raises(InputError, match=r"rank_0.bin has 3 bytes, not 7; there is no complete checkpoint beside it"):
        latest_checkpoint(tmp_path)


def test_latest_that_names_nothing_offers_what_is_there(tmp_path):
    CheckpointStore(tmp_path, keep=2).write(5, write_weights, {})
    (tmp_path / "latest").write_text("step_00000009\n")
    with pytest.raises(InputError, match=r"'step_00000009', which is not there; step_00000005 beside it is complete"):
        latest_checkpoint(tmp_path)


def test_one_changed_byte_is_found(tmp_path):
    folder = CheckpointStore(tmp_path, keep=1).write(5, write_weights, {})
    check_contents(folder)
    (folder / "shards" / "rank_0.bin").write_bytes(b"weightz")
    read_metadata(folder)  # sizes are right
    with pytest.raises(InputError, match="shards/rank_0.bin is not what was written"):
        check_contents(folder)


def test_ranks_share_the_reading(tmp_path):
    """Every file is read by one of three ranks."""
    folder = CheckpointStore(tmp_path, keep=1).write(
        5, lambda made: [(made / f"{name}.bin").write_bytes(b"x") for name in range(7)], {}
    )
    for name in range(7):
        (folder / f"{name}.bin").write_bytes(b"y")
        found = []
        for rank in range(3):
            try:
                check_contents(folder, part=rank, parts=3)
            except InputError:
                found.append(rank)
        (folder / f"{name}.bin").write_bytes(b"x")
        assert len(found) == 1


def test_format_1_is_still_read(tmp_path):
    """As the first version wrote it: sizes, no checksums."""
    folder = tmp_path / "step_00000007"
    folder.mkdir()
    write_weights(folder)
    manifest = {"format_version": 1, "step": 7, "metadata": {"a": 1}, "files": {"shards/rank_0.bin": 7}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "latest").write_text("step_00000007\n")
    assert read_metadata(latest_checkpoint(tmp_path)) == {"a": 1, "step": 7}
    check_contents(folder)
    CheckpointStore(tmp_path, keep=2).write(8, write_weights, {})
    assert names(tmp_path) == {"step_00000007", "step_00000008", "latest"}


def test_what_a_writer_says_of_its_files_is_checked(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    partial = store.begin(1)
    write_weights(partial)
    with pytest.raises(OSError, match="has 7 bytes here, and its writer wrote 8"):
        store.commit(partial, 1, {}, {"shards/rank_0.bin": FileRecord(8, 0)})
    with pytest.raises(OSError, match="has None bytes here"):
        store.commit(partial, 1, {}, {"shards/rank_1.bin": FileRecord(7, 0)})
    assert store.latest() is None
    known = FileRecord(7, 123)
    folder = store.commit(partial, 1, {}, {"shards/rank_0.bin": known})
    assert json.loads((folder / "manifest.json").read_text())["files"] == {"shards/rank_0.bin": vars(known)}


@pytest.mark.parametrize("call", ["rename", "replace", "fsync"])
def test_a_failure_at_any_call_keeps_the_previous_checkpoint(tmp_path, monkeypatch, call):
    """Every rename, replace and fsync of a save fails once; a reader always finds checkpoint 1 or 2, whole."""
    owner = Path if call == "rename" else os
    original = getattr(owner, call)
    for attempt in range(100):
        root = tmp_path / str(attempt)
        store = CheckpointStore(root, keep=1)
        store.write(1, write_weights, {})
        calls = iter(range(1000))

        def failing(*args, calls=calls, attempt=attempt):
            if next(calls) == attempt:
                raise OSError("no space left on device")
            return original(*args)

        monkeypatch.setattr(owner, call, failing)
        try:
            store.write(2, write_weights, {})
            failed = False
        except OSError:
            failed = True
        monkeypatch.undo()
        assert read_metadata(latest_checkpoint(root))["step"] in (1, 2)
        store.write(3, write_weights, {})
        assert names(root) == {"step_00000003", "latest"}
        if not failed:
            assert attempt > 0
            return
    pytest.fail("the save never succeeded")


def test_kill_inside_the_writer_leaves_the_previous_checkpoint(tmp_path):
    program = textwrap.dedent(
        """
        import os, signal, sys
        from megatron_ext.checkpoint.store import CheckpointStore
        def killed(folder):
            (folder / "half.bin").write_bytes(b"x")
            os.kill(os.getpid(), signal.SIGKILL)
        store = CheckpointStore(sys.argv[1], keep=2)
        store.write(1, lambda folder: (folder / "a.bin").write_bytes(b"1"), {})
        store.write(2, killed, {})
        """
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    store = CheckpointStore(tmp_path, keep=2)
    assert store.latest().name == "step_00000001"
    assert any(name.startswith(store_module.PARTIAL) for name in names(tmp_path))
    store.write(2, write_weights, {})
    assert names(tmp_path) == {"step_00000001", "step_00000002", "latest"}


def test_other_ranks_write_into_the_main_ranks_folder(tmp_path):
    """Two stores of one group, run in turn: the other rank is told the folder, and neither begins nor commits."""
    sent = []

    def send(compute):
        sent.append(compute())
        return sent[-1]

    other = CheckpointStore(tmp_path, keep=1, from_main=lambda compute: sent[-1])

    def main_writer(folder: Path) -> None:
        write_weights(folder)
        (other.begin(3) / "rank_1.bin").write_bytes(b"more")

    folder = CheckpointStore(tmp_path, keep=1, from_main=send).write(3, main_writer, {"world_size": 2})
    assert other.commit(sent[0], 3, {}) == folder == tmp_path / "step_00000003"
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == {"rank_1.bin", "shards/rank_0.bin"}

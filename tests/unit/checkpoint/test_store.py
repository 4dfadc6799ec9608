"""Checkpoint folders: whole or absent, whatever moment the writer is killed at."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_ext.checkpoint import store as store_module
from megatron_ext.checkpoint.store import CheckpointStore, latest_checkpoint, read_metadata
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


def test_keep_below_one_is_refused(tmp_path):
    with pytest.raises(InputError, match="checkpoint.keep is 0"):
        CheckpointStore(tmp_path, keep=0)


@pytest.mark.parametrize("damage", ["missing", "short", "manifest", "version", "garbage"])
def test_incomplete_or_unknown_folders_are_refused_by_name(tmp_path, damage):
    folder = CheckpointStore(tmp_path, keep=1).write(5, write_weights, {})
    manifest = folder / "manifest.json"
    if damage == "missing":
        (folder / "shards" / "rank_0.bin").unlink()
    elif damage == "short":
        (folder / "shards" / "rank_0.bin").write_bytes(b"wei")
    elif damage == "manifest":
        manifest.unlink()
    elif damage == "version":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 99}))
    else:
        manifest.write_text("{")
    with pytest.raises(InputError, match="step_00000005"):
        latest_checkpoint(tmp_path)


def test_latest_that_names_nothing_lists_what_is_there(tmp_path):
    CheckpointStore(tmp_path, keep=2).write(5, write_weights, {})
    (tmp_path / "latest").write_text("step_00000009\n")
    with pytest.raises(InputError, match=r"'step_00000009', which is not there: .*step_00000005"):
        latest_checkpoint(tmp_path)


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
    """Two stores of one group, run in turn: the other rank gets the folder's name by broadcast and never publishes."""
    sent = []

    def send(name: str) -> str:
        sent.append(name)
        return name

    other = CheckpointStore(tmp_path, keep=1, is_main=False, broadcast=lambda name: sent[0])

    def main_writer(folder: Path) -> None:
        write_weights(folder)
        other.write(3, lambda shared: (shared / "rank_1.bin").write_bytes(b"more"), {})

    folder = CheckpointStore(tmp_path, keep=1, broadcast=send).write(3, main_writer, {"world_size": 2})
    assert (folder / "rank_1.bin").read_bytes() == b"more"
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == {"rank_1.bin", "shards/rank_0.bin"}

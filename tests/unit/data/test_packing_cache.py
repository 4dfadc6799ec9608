"""The packed index on disk: one builder, also where processes start together, and none left half-done."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.config import InputError
from megatron_ext.data.built_once import LOCK
from megatron_ext.data.packing import PackedIndex
from megatron_ext.data.packing_cache import cached_index

FORK = multiprocessing.get_context("fork")


def index(document: int = 7) -> PackedIndex:
    return PackedIndex(np.array([0, 1]), np.array([[document, 0, 9]], dtype=np.uint32), np.array([], dtype=np.int64))


def open_index(folder: Path, seconds: float, builders, start, results) -> None:
    """In a process of its own: builds for some seconds where it must, and counts the builders."""

    def build() -> PackedIndex:
        with builders.get_lock():
            builders.value += 1
        time.sleep(seconds)
        return index()

    start.wait()
    results.put(cached_index(folder, {"seq_length": 9}, build).pieces.tolist())


class Processes:
    """Processes that open one index."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.builders, self.begin, self.results = FORK.Value("i", 0), FORK.Event(), FORK.Queue()

    def start(self, seconds: float) -> multiprocessing.Process:
        arguments = (self.folder, seconds, self.builders, self.begin, self.results)
        process = FORK.Process(target=open_index, args=arguments, daemon=True)
        process.start()
        return process


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache" / "packing-0123"


@pytest.fixture
def processes(folder) -> Processes:
    return Processes(folder)


def test_one_of_several_processes_builds(folder, processes):
    started = [processes.start(0.3) for _ in range(6)]
    processes.begin.set()
    assert [processes.results.get(timeout=20) for _ in started] == [[[7, 0, 9]]] * 6
    for process in started:
        process.join()
    assert processes.builders.value == 1 and all(process.exitcode == 0 for process in started)
    assert sorted(os.listdir(folder)) == ["pieces.npy", "shape.json", "skipped_documents.npy", "window_offsets.npy"]


def test_a_killed_builder_is_followed_by_the_next(folder, processes):
    processes.begin.set()
    killed = processes.start(60)
    while processes.builders.value == 0:
        time.sleep(0.005)
    waiting = processes.start(0)
    time.sleep(0.2)
    assert waiting.is_alive() and processes.builders.value == 1, "the second waits for the first"
    unfinished = folder.with_name(
        f"{folder.name}.unfinished-{os.uname().nodename}.abcd"
    )  # as if killed while it writes
    foreign = folder.with_name(f"{folder.name}.unfinished-another.abcd")  # perhaps at work, where locks do not reach it
    for path in (unfinished, foreign):
        path.mkdir()
        (path / "pieces.npy").write_bytes(b"half")
    os.kill(killed.pid, signal.SIGKILL)
    assert processes.results.get(timeout=20) == [[7, 0, 9]]
    assert processes.builders.value == 2 and not unfinished.exists() and foreign.exists()


def test_without_locks_the_first_rename_wins(folder, monkeypatch, caplog):
    """A file system without locks: another process has completed the folder while this one was building."""

    def refuse(file, operation):
        raise OSError(95, "Operation not supported")

    def build_late() -> PackedIndex:
        cached_index(folder, {}, index)  # as the other process
        return index(8)

    monkeypatch.setattr("fcntl.flock", refuse)
    assert cached_index(folder, {}, build_late).pieces.tolist() == [[7, 0, 9]]
    assert sorted(os.listdir(folder.parent)) == sorted([folder.name, LOCK]), "what the loser wrote is gone"
    assert "cannot be locked (Operation not supported)" in caplog.text


def test_a_complete_index_needs_no_permission_to_write(folder):
    cached_index(folder, {}, index)
    (folder.parent / LOCK).unlink()
    found = cached_index(folder, {}, lambda: pytest.fail("built again"))
    assert isinstance(found.pieces, np.memmap) and isinstance(found.window_offsets, np.memmap)
    assert not (folder.parent / LOCK).exists()


def test_a_damaged_index_is_named(folder):
    cached_index(folder, {}, index)
    (folder / "pieces.npy").write_bytes(b"")
    with pytest.raises(InputError, match="packed index .*packing-0123 is damaged .*: remove it, it will be rebuilt"):
        cached_index(folder, {}, index)

"""A file is the old one or the new one, never half of one."""

import os
import signal
import threading
from pathlib import Path

import pytest

from megatron_ext.config import InputError
from megatron_ext.files import replacing, writing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_old_file_stays_until_the_block_ends(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with replacing(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old" and temporary.parent == tmp_path
    assert target.read_text() == "new" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("is_shared", [False, True])
def test_an_exception_leaves_the_old_file_alone(tmp_path, is_shared):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(target, is_shared=is_shared) as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert target.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_what_a_killed_process_leaves_is_overwritten(tmp_path):
    target = tmp_path / "a.txt"
    if (child := os.fork()) == 0:
        with replacing(target) as temporary:
            temporary.write_text("of a killed process")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert names(tmp_path) == [".a.txt.tmp"]
    with replacing(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_writers_of_a_shared_file_do_not_meet(tmp_path):
    target, texts = tmp_path / "a.txt", [letter * 1_000_000 for letter in "abcd"]
    together = threading.Barrier(len(texts))

    def write(text: str) -> None:
        with replacing(target, is_shared=True) as temporary:
            together.wait()
            temporary.write_text(text)
            together.wait()

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_text() in texts and names(tmp_path) == ["a.txt"]


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append("flushed") or fsync(descriptor))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("renamed") or replace(*paths))
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert done == ["flushed", "renamed"]


def test_what_cannot_be_written_is_one_line(tmp_path):
    target = tmp_path / "absent" / "a.txt"
    with pytest.raises(InputError, match=r"^output: cannot write .*/absent/a.txt \(No such file or directory\): make"):
        with writing(target, "output"), replacing(target) as temporary:
            temporary.write_text("new")

"""Where a run comes from: true, one entry per start, and never in the way of a start."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import pytest

from megatron_ext.config import InputError
from megatron_ext.config.observe import ObserveConfig
from megatron_ext.files import read_json_lines
from megatron_ext.observe import Run
from megatron_ext.observe.provenance import append_provenance, collect_provenance, git_state, read_provenance
from megatron_ext.runtime.hardware import describe_hardware


def git(folder: Path, *arguments: str) -> str:
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    environment = {**os.environ, **identity}
    result = subprocess.run(
        ["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def program(folder: Path, name: str, script: str) -> Path:
    """An executable of that name in a folder of its own."""
    folder.mkdir()
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return folder


def test_git_state(tmp_path, monkeypatch):
    root = tmp_path / "repository"
    (root / "package").mkdir(parents=True)
    assert git_state(root) is None
    git(tmp_path, "init", "-q", "repository")
    (root / "package" / "code.py").write_text("1\n")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "x")
    commit = git(root, "rev-parse", "HEAD")
    (root / "notes").write_text("untracked")
    assert git_state(root) == {"commit": commit, "dirty": False}
    (root / "package" / "code.py").write_text("2\n")
    assert git_state(root) == {"commit": commit, "dirty": True}
    assert git_state(root / "package") is None, "a repository around the code is another one"
    monkeypatch.setenv("PATH", "")
    assert git_state(root) is None


def test_what_is_collected(tmp_path):
    (tmp_path / "a.manifest.json").write_text("{}\n")
    prefixes = [str(tmp_path / name) for name in "ab"]
    config = {"data": {"train": [{"prefix": prefixes[0], "weight": 1.0}], "valid": [{"prefix": prefixes[1]}]}}
    entry = collect_provenance(config)
    assert entry["manifests"] == {prefixes[0]: hashlib.sha256(b"{}\n").hexdigest(), prefixes[1]: None}
    assert entry["packages"]["torch"] == importlib.metadata.version("torch")
    assert entry["python"] == platform.python_version()
    assert entry["hardware"]["cores"] == len(os.sched_getaffinity(0)) and entry["hardware"]["cpu"]


def test_gpus_are_what_the_driver_lists(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(program(tmp_path / "two", "nvidia-smi", "echo 'H200, 143771 MiB, 580.1'; echo b")))
    assert describe_hardware()["gpus"] == ["H200, 143771 MiB, 580.1", "b"]
    monkeypatch.setenv("PATH", str(program(tmp_path / "sick", "nvidia-smi", "echo no driver; exit 9")))
    assert describe_hardware()["gpus"] == []
    monkeypatch.setenv("PATH", "")
    assert describe_hardware()["gpus"] == []


def test_every_start_that_trains_adds_an_entry(tmp_path):
    observe = ObserveConfig(run_dir=str(tmp_path), tensorboard=False)
    for step, size in ((0, 4), (2, 8)):
        with Run.open(observe, True, f"train:\n  global_batch_size: {size}\n") as run:
            run.add_provenance(identities={"data": "abc"})
            run.truncate_after(step)
    with Run.open(observe, True, "refused: true\n"):
        pass  # a start that ends before it trains
    with Run.open(observe, False, "{}\n") as run:  # another rank
        run.add_provenance(identities={})
        run.truncate_after(2)
        assert run.provenance == {}
    entries = read_provenance(tmp_path)
    assert [entry["step"] for entry in entries] == [0, 2]
    assert [entry["config"]["train"]["global_batch_size"] for entry in entries] == [4, 8]
    assert entries[0]["identities"] == {"data": "abc"}
    starts = [event for event in read_json_lines(tmp_path / "events.jsonl") if event["event"] == "start"]
    assert len(starts) == 3 and starts[0]["provenance"]["packages"] == entries[0]["packages"]
    assert isinstance(starts[0]["time"], float)


def test_broken_installations_do_not_stop_a_run(tmp_path, monkeypatch):
    """An interrupted pip leaves folders without METADATA, with an empty one, and with a name of its own."""
    for name, content in (("torchfoo-1.0", None), ("~rch-2.0", None), ("empty-1.0", ""), ("half-1.0", "Name: half\n")):
        (tmp_path / f"{name}.dist-info").mkdir()
        if content is not None:
            (tmp_path / f"{name}.dist-info" / "METADATA").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    entry = collect_provenance({})
    assert entry["packages"]["torch"] and entry["packages"]["half"] is None and "untold" not in entry


def test_what_cannot_be_found_out_is_said_and_does_not_stop_a_run(tmp_path, monkeypatch):
    (tmp_path / "a.manifest.json").symlink_to("/proc/self/mem")  # a file that no read can be done of
    entry = collect_provenance({"train": [{"prefix": str(tmp_path / "a")}]})
    assert entry["manifests"] == {} and entry["untold"]["manifests"].startswith("OSError: ")
    assert entry["packages"]["torch"]


@pytest.mark.parametrize("content", ["[{", '{"step": 1}'])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "provenance.json").write_text(content)
    with pytest.raises(InputError, match=r"provenance\.json is .*: move it away"):
        read_provenance(tmp_path)
    append_provenance(tmp_path, {"step": 0})
    assert read_provenance(tmp_path) == [{"step": 0}]
    assert (tmp_path / "provenance.json.damaged").read_text() == content

"""A run whose media change between its starts, or turn out to be bad."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_ext.config import InputError
from megatron_ext.files import read_json_lines
from tokenizer_train.vision import train

ROOT = Path(__file__).parents[3]
OPTIONS = {
    "model.codebook_size": 16,
    "model.ch_mult": "[1,1]",
    "model.attn_resolutions": "[]",
    "media.size": 16,
    "media.batch_size": 4,
    "media.clip_share": 0,
    "codebook.start_step": 0,
    "codebook.kmeans_batches": 0,
    "optim.lr_warmup_steps": 0,
    "train.train_steps": 20,
    "train.eval_interval": 0,
    "train.num_threads": 1,
    "observe.tensorboard": "false",
}


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def folder(tmp_path):
    """Eight pictures."""
    random = np.random.default_rng(1)
    (tmp_path / "media").mkdir()
    for number in range(8):
        add_picture(tmp_path / f"media/{number}.png", random)
    return tmp_path / "media"


def add_picture(path: Path, random: np.random.Generator) -> None:
    Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)


def go_on_to(step: int, run: Path, folder: Path, **changed: object) -> None:
    """Start, or start again, and stop after `step`."""
    done = len([line for line in lines(run, "metrics") if "loss" in line])
    options = OPTIONS | {"media.inputs": f"[{folder}]", "observe.run_dir": run, "train.exit_interval": step}
    options |= {name.replace("__", "."): value for name, value in changed.items()}
    train.main([f"--config={ROOT}/examples/movqgan_tiny_cpu.yaml", *(f"--{k}={v}" for k, v in options.items())])
    steps = [line["step"] for line in lines(run, "metrics") if "loss" in line]
    assert steps == list(range(1, step + 1)) and step > done


def lines(run: Path, name: str) -> list[dict]:
    return read_json_lines(run / f"{name}.jsonl")


def events(run: Path, kind: str) -> list[dict]:
    return [event for event in lines(run, "events") if event["event"] == kind]


def test_other_media_are_refused_unless_allowed(folder, tmp_path):
    run = tmp_path / "run"
    go_on_to(2, run, folder)
    os.utime(folder / "3.png")
    go_on_to(3, run, folder, media__workers=1, media__index_dir=tmp_path / "index")
    add_picture(folder / "8.png", np.random.default_rng(2))
    (folder / "9.png").write_bytes(b"no picture")
    wanted = (
        r"media.inputs = \['.*media'\] hold 10 samples, 1 of them unreadable, but .*step_00000003 was made with "
        r"others .*, 8 samples, 0 of them unreadable: put those back, set media.allow_change true"
    )
    before = lines(run, "metrics")
    with pytest.raises(InputError, match=wanted) as refused:
        go_on_to(4, run, folder, media__max_bad_fraction=0.5)
    assert "\n" not in str(refused.value) and lines(run, "metrics") == before
    assert not events(run, "media_changed")
    go_on_to(4, run, folder, media__max_bad_fraction=0.5, media__allow_change="true")
    (event,) = events(run, "media_changed")
    assert event["step"] == 3
    assert [event[when]["samples"] for when in ("before", "now")] == [8, 10]
    assert event["before"]["digest"] != event["now"]["digest"]
    go_on_to(5, run, folder, media__max_bad_fraction=0.5)
    assert len(events(run, "media_changed")) == 1, "the next checkpoint knows the new ones"


def test_the_same_media_elsewhere_are_the_same(folder, tmp_path):
    run = tmp_path / "run"
    go_on_to(2, run, folder)
    elsewhere = folder.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"media.inputs = .*elsewhere.*, but .* was made with .*/media"):
        go_on_to(3, run, elsewhere)
    go_on_to(3, run, elsewhere, media__allow_change="true")
    assert not events(run, "media_changed")


def test_a_checkpoint_that_does_not_name_its_media_is_taken_up(folder, tmp_path):
    run = tmp_path / "run"
    go_on_to(2, run, folder)
    manifest = run / "checkpoints/step_00000002/manifest.json"
    saved = json.loads(manifest.read_text())
    assert saved["metadata"].pop("media")["samples"] == 8
    del saved["metadata"]["config"]["media"]["allow_change"]
    manifest.write_text(json.dumps(saved))
    add_picture(folder / "8.png", np.random.default_rng(2))
    go_on_to(3, run, folder)
    assert not events(run, "media_changed")


def test_bad_samples_are_events_once_in_a_run(folder, tmp_path, capsys):
    run = tmp_path / "run"
    (folder / "2.png").write_bytes(b"no picture")
    for number in (4, 5):
        (folder / f"{number}.png").write_bytes((folder / f"{number}.png").read_bytes()[:60])
    go_on_to(3, run, folder, media__max_bad_fraction=0.5)
    found = events(run, "bad_sample")
    assert sorted(event["source"] for event in found) == [str(folder / f"{number}.png") for number in (2, 4, 5)]
    assert found[0]["step"] == 0 and found[0]["reason"].startswith("not a readable picture")
    assert all(event["rank"] == 0 and event["reason"] for event in found)
    counts = [line["timing"]["bad_samples"] for line in lines(run, "metrics") if "loss" in line]
    assert counts[-1] == 3 and counts == sorted(counts)
    assert capsys.readouterr().out.count("skipped ") == 3
    go_on_to(5, run, folder, media__max_bad_fraction=0.9)
    assert len(events(run, "bad_sample")) == 3
    with pytest.raises(InputError, match=r"of 8 samples cannot be used, more than media.max_bad_fraction 0.2"):
        go_on_to(8, run, folder, media__max_bad_fraction=0.2)

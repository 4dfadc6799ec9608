"""Where a release comes from: what the run wrote down, and "not recorded" for what it did not."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from megatron_ext.checkpoint import CheckpointStore
from megatron_ext.config import InputError
from megatron_ext.hf.card import model_card
from megatron_ext.hf.provenance import provenance_of

SEED, SAMPLES, SEQ_LENGTH = 7, 1001, 64
WINDOWS = (750, 201, 50)
WEIGHTS = (0.75, 0.2, 0.05)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder stopped after step 4, whose metrics go on to step 5 and end in a cut line."""
    folder = tmp_path / "run"
    names = ("media", "prose", "clips")
    data = [{"prefix": str(tmp_path / name), "weight": weight} for name, weight in zip(names, WEIGHTS, strict=True)]
    (tmp_path / "prose.manifest.json").write_text("{}\n")
    config = {
        "train": {"seq_length": SEQ_LENGTH, "seed": SEED},
        "data": {"train": data},
        "checkpoint": {"init_from": "x"},
    }

    def write(body: Path) -> None:
        (body / "config.yaml").write_text(yaml.safe_dump(config))

    blend = {"datasets": [{"consumed": windows} for windows in WINDOWS]}
    state = {"step": 4, "consumed_samples": SAMPLES, "consumed_tokens": SAMPLES * SEQ_LENGTH, "blend": blend}
    CheckpointStore(folder / "checkpoints", 1).write(4, write, {"train_state": state, "vision_tokenizer": "abc"})
    start = {
        "step": 0, "time": "2026-11-22T00:00:00Z", "command": ["/home/me/pretrain_emu3.py"], "ranks": 8,
        "python": "3.11.9", "git": {"commit": "0123abc", "dirty": True},
        "packages": {"torch": "2.13.0", "megatron_core": "0.16.1", "rich": "1"},
        "hardware": {"cpu": "a CPU", "cores": 8, "memory_gib": 1, "gpus": ["H200, 143771 MiB, 580.1"]},
        "manifests": {data[0]["prefix"]: "f" * 64}, "identities": {"data": "d"}, "config": {},
    }  # fmt: skip
    starts = [start, {**start, "step": 5, "git": None}]  # the second resumed from a later checkpoint
    (folder / "provenance.json").write_text(json.dumps(starts))
    lines = [
        {"step": 3, "loss": 3.0, "grad_norm": 1.0},
        {"step": 4, "loss": 2.5, "loss_text": 2.0, "loss_dataset/clips": None},
        {"step": 4, "valid_loss": 2.75}, {"step": 5, "loss": 1.0},
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
    return folder


def test_a_run_is_told(run: Path) -> None:
    facts = provenance_of(run / "checkpoints" / "step_00000004")
    assert (facts["step"], facts["consumed_samples"], facts["consumed_tokens"]) == (4, SAMPLES, SAMPLES * SEQ_LENGTH)
    assert facts["losses"] == {
        "step": 4, "loss": 2.5, "loss_text": 2.0, "loss_dataset/clips": None, "valid_step": 4, "valid_loss": 2.75,
    }  # fmt: skip
    (start,) = facts["starts"]
    assert start["git"] == {"commit": "0123abc", "dirty": True}
    assert start["packages"] == {"torch": "2.13.0", "megatron-core": "0.16.1"}
    assert "/home/me" not in json.dumps(start)
    assert [dataset["tokens"] for dataset in facts["datasets"]] == [windows * SEQ_LENGTH for windows in WINDOWS]
    hashes = [dataset["manifest_sha256"] for dataset in facts["datasets"]]
    assert hashes == ["f" * 64, hashlib.sha256(b"{}\n").hexdigest(), None]


def test_the_card_holds_it(run: Path) -> None:
    facts = provenance_of(run / "checkpoints" / "step_00000004")
    card = model_card(title="T", front={"tags": ["emu3"]}, body="B", provenance=facts)
    matter = card.split("---\n")[1]
    assert yaml.safe_load(matter) == {"tags": ["emu3"]}
    for line in (
        "| training step | 4 |",
        f"| ids seen | {SAMPLES * SEQ_LENGTH:,} |",
        "| began from | x |",
        "| losses | loss 2.5000, loss_text 2.0000, valid_loss 2.7500 |",
        "| 0 | 2026-11-22T00:00:00Z | 0123abc with local changes | torch 2.13.0, megatron-core 0.16.1 | "
        "8 ranks; a CPU, H200, 143771 MiB, 580.1 |",
        f"| media | 0.75 | {facts['datasets'][0]['tokens']:,} | {'f' * 64} |",
    ):
        assert line in card
    assert f"| clips | 0.05 | {facts['datasets'][2]['tokens']:,} | not recorded |" in card
    assert "seq_length: 64" in card


def test_weights_without_a_run(tmp_path: Path) -> None:
    """An import from Hugging Face."""

    def write(body: Path) -> None:
        (body / "config.yaml").write_text("train: {seq_length: 64}\n")

    folder = CheckpointStore(tmp_path, 1).write(0, write, {"vocabulary": "v"})
    facts = provenance_of(folder)
    assert facts["step"] is None and facts["starts"] == facts["datasets"] == [] and facts["losses"] == {}
    assert "torch" in facts["exported_with"]
    card = model_card(title="T", front={}, body="B", provenance=facts)
    for what in ("training step", "ids seen", "began from", "vision tokenizer of the data", "losses"):
        assert f"| {what} | not recorded |" in card
    assert "Training data:\n\nnot recorded." in card


def test_a_damaged_record_is_named(run: Path) -> None:
    (run / "provenance.json").write_text("[{")
    with pytest.raises(InputError, match=r"provenance\.json is damaged .*: move it away"):
        provenance_of(run / "checkpoints" / "step_00000004")

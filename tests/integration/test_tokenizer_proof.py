"""The proof's runner: the programs it names, what it reads from their reports, what it writes into the docs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from megatron_ext.config import InputError, load
from tests.architecture.source import ROOT
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig

_spec = importlib.util.spec_from_file_location("tokenizer_proof", ROOT / "examples" / "tokenizer_proof.py")
proof = importlib.util.module_from_spec(_spec)
sys.modules["tokenizer_proof"] = proof
_spec.loader.exec_module(proof)


def _row(name: str, psnr: float, **more: object) -> dict:
    return {"name": name, "psnr": psnr, "ssim": 0.5, "bits_per_pixel": 0.1875, "samples": 2, **more}


def _coded(name: str, psnr: float, distance: float, used: int) -> dict:
    network = "EfficientNet-Lite0 distance"
    more = {"codes_used": used, "codebook_size": 4096, "perplexity": 100.0}
    return _row(name, psnr, perceptual=distance, perceptual_network=network, **more)


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the programs leave: metrics of three trainings, two reports."""
    monkeypatch.chdir(tmp_path)
    for name, seconds in (("common", 1200.0), ("l2", 300.0), ("perceptual", 700.0)):
        lines = [{"step": step, "loss_l2": 1 / step, "timing": {"step_seconds": seconds / 2}} for step in (1, 2)]
        folder = proof.ROOT / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 2}]))
    versions = {"versions": {"torch": "2"}, "threads": 2}
    bicubic = _row("bicubic 8x", 22.0)
    held_out = [_coded("l2", 23.9, 0.5, 3000), _coded("perceptual", 23.6, 0.4, 3100), bicubic]
    everything = [_coded("l2", 24.0, 0.5, 4000), _coded("perceptual", 23.7, 0.4, 3900)]
    for name, rows in (("held_out", held_out), ("all", everything)):
        (proof.ROOT / name).mkdir()
        (proof.ROOT / name / "report.json").write_text(json.dumps({"rows": rows, **versions}))
    Image.new("RGB", (32, 16), "red").save(proof.ROOT / "held_out" / "grid_256.png")
    proof.PAGE.parent.mkdir()
    proof.PAGE.write_text(f"before\n{proof.BEGIN}\nold\n{proof.END}\nafter\n")
    return tmp_path


def test_verdicts(finished: Path) -> None:
    found = proof.results(1)
    assert found["seconds"] == {"common": 1200, "l2": 300, "perceptual": 700}
    assert [(verdict["met"], verdict["reached"]) for verdict in found["verdicts"]] == [
        (True, "+1.60 dB; trained on the squared error alone +1.90 dB"),
        (True, "3,900 of 4,096 on all photographs"),
        (True, "0.4000 against 0.5000 (EfficientNet-Lite0 distance)"),
        (True, "31m40s"),
    ]


def test_a_missed_aim_is_said(finished: Path) -> None:
    rows = {name: row for row in proof.results(1)["held_out"] for name in [row["name"]]}
    rows["perceptual"] |= {"psnr": 23.49, "perceptual": 0.5}
    used = {"codes_used": 3276, "codebook_size": 4096}
    missed = proof.verdicts(rows, used, {"common": 3000, "l2": 10, "perceptual": 601})
    assert [verdict["met"] for verdict in missed] == [False] * 4


def test_the_page_is_written(finished: Path) -> None:
    proof.write_docs(proof.results(1))
    page = proof.PAGE.read_text()
    assert page.startswith(f"before\n{proof.BEGIN}\n") and page.endswith(f"{proof.END}\nafter\n") and "old" not in page
    assert "| more than 80% of at least 4,096 codes in use | 3,900 of 4,096 on all photographs | yes |" in page
    assert "CPU threads: 1 in training, 2 in the evaluation; torch 2." in page
    assert "| bicubic 8x | 0.188 | 22.00 | 0.5000 |  |  |  |" in page
    assert Image.open(proof.DOCS / "grid.jpg").size == (32, 16) and "<svg" in (proof.DOCS / "curve.svg").read_text()
    assert json.loads((proof.DOCS / "results.json").read_text())["threads"] == 2
    proof.write_docs(proof.results(1))  # again
    assert proof.PAGE.read_text() == page
    proof.PAGE.write_text("no marks")
    with pytest.raises(InputError, match="has no line"):
        proof.write_docs(proof.results(1))


def test_commands_name_what_exists() -> None:
    config = proof.ProofConfig(python="python")
    all_commands = proof.commands(config, {"common": 1000, "l2": 500, "perceptual": 500})
    assert [command[2].rpartition(".")[2] for command in all_commands] == ["train"] * 3 + ["evaluate"] * 2
    for command in all_commands:
        files = [part for part in command if part.endswith(".yaml")]
        assert all((ROOT / file).exists() for file in [*files, command[2].replace(".", "/") + ".py"])
        if files:
            read = load(VisionTokenizerTrainingConfig, [*command[3:], "--observe.log_interval=1"])
            assert read.train.train_steps == (1000 if len(files) == 1 else 500)
            assert read.codebook.restart_until_step == (1000 if len(files) == 1 else 300)
            assert read.observe.run_dir.startswith(str(proof.ROOT))
            assert len(files) == 1 or read.checkpoint.init_from == str(proof.ROOT / "common" / "tokenizer")
    trial = load(VisionTokenizerTrainingConfig, proof.trial_command(config, "perceptual", Path("x"))[3:])
    assert trial.checkpoint.init_from is None and trial.train.train_steps == proof.TRIAL_STEPS


def test_steps_fill_the_minutes_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    proof.ROOT.mkdir(parents=True)
    counts = proof.divide(3000, {"common": 0.2, "perceptual": 1.0}, proof.ROOT / "steps.json")
    assert counts == {"common": 9000, "l2": 1200, "perceptual": 1200}
    assert proof.step_counts(proof.ProofConfig(minutes=1)) == counts


def test_a_failing_program_ends_it(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(InputError, match="-c raise SystemExit.3. ended with exit code 3"):
        proof.run_all([[sys.executable, "-c", "print('first')"], [sys.executable, "-c", "raise SystemExit(3)"]])

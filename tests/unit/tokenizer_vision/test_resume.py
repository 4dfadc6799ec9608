"""A run whose process is killed, whose disk is full, that is told to stop, or that is configured otherwise."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_ext.config import InputError
from megatron_ext.files import read_json_lines
from megatron_ext.vision import load_vision_tokenizer
from tests.support.full_disk import no_file_beyond
from tokenizer_train.vision import train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples/movqgan_tiny_cpu.yaml"
OPTIONS = {
    "model.codebook_size": 32,
    "model.ch_mult": "[1,1]",
    "model.attn_resolutions": "[]",
    "media.size": 16,
    "media.clip_share": 0.3,
    "codebook.start_step": 3,
    "codebook.kmeans_batches": 4,
    "codebook.restart_interval": 2,
    "codebook.restart_until_step": 12,
    "codebook.update": "ema",
    "loss.codebook": 0,
    "loss.adversarial": 0.1,
    "loss.adversarial_start_step": 2,
    "loss.adversarial_scale": "adaptive",
    "discriminator.width": 8,
    "discriminator.num_layers": 2,
    "discriminator.optim.lr_decay_style": "constant",
    "optim.lr_warmup_steps": 2,
    "train.train_steps": 30,
    "train.accumulation_steps": 2,
    "train.ema_decay": 0.8,
    "train.freeze_batch_norm_step": 9,
    "train.eval_interval": 10,
    "train.eval_samples": 2,
    "train.num_threads": 1,
    "checkpoint.save_interval": 4,
}
KILLED_AFTER = 10


def arguments(run_dir: Path, **changed: object) -> list[str]:
    options = OPTIONS | {name.replace("__", "."): value for name, value in changed.items()}
    given = [f"--{name}={value}" for name, value in options.items()]
    return [f"--config={EXAMPLE}", *given, f"--observe.run_dir={run_dir}"]


def lines(folder: Path) -> list[dict]:
    """The metrics without what depends on the clock."""
    return [{k: v for k, v in line.items() if k != "timing"} for line in read_json_lines(folder / "metrics.jsonl")]


def events(folder: Path) -> list[str]:
    return [event["event"] for event in read_json_lines(folder / "events.jsonl")]


@pytest.fixture(scope="module", autouse=True)
def at_root():
    before = Path.cwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    train.main(arguments(folder))
    return folder


def test_run_that_was_killed_goes_on_as_if_it_had_not_been(whole, tmp_path):
    command = [sys.executable, "-m", "tokenizer_train.vision.train", *arguments(tmp_path)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(lines(tmp_path)) < KILLED_AFTER:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert events(tmp_path)[-1] == "save" and len(lines(tmp_path)) < len(lines(whole))
    train.main(arguments(tmp_path))
    assert lines(tmp_path) == lines(whole)
    resumed, other = (load_vision_tokenizer(folder / "tokenizer") for folder in (tmp_path, whole))
    assert resumed.identity == other.identity


def test_average_is_evaluated_and_released(whole):
    (saved,) = (whole / "checkpoints").glob("step_*/state.pt")
    state = torch.load(saved, weights_only=True)
    released = load_vision_tokenizer(whole / "tokenizer").state_dict()
    assert all(torch.equal(released[name], tensor) for name, tensor in state["average"].items())
    assert any(not torch.equal(released[name], tensor) for name, tensor in state["model"].items())
    assert state["step"] == 30 and state["consumed_samples"] == lines(whole)[-2]["consumed_samples"]


def test_run_stops_where_it_is_told_to(whole, tmp_path, capsys):
    train.main(arguments(tmp_path, train__exit_interval=6, observe__profile_step_start=2))
    assert (tmp_path / "profile/rank0_step2.trace.json.gz").stat().st_size > 1000
    assert "train.exit_interval 6: saved at step 6" in capsys.readouterr().out
    (tmp_path / "stop").touch()
    train.main(arguments(tmp_path))
    assert "stop: saved at step 7" in capsys.readouterr().out
    assert not (tmp_path / "stop").exists() and not (tmp_path / "tokenizer").exists()
    assert events(tmp_path).count("stop") == 2
    assert lines(tmp_path) == lines(whole)[:7]
    with pytest.raises(InputError, match=r"train.ema_decay = 0.5, but .* was made with 0.8"):
        train.main(arguments(tmp_path, train__ema_decay=0.5))


def test_run_from_before_a_field_goes_on_with_its_default(tmp_path):
    train.main(arguments(tmp_path, optim__optimizer="adam", train__exit_interval=2))
    manifest = tmp_path / "checkpoints/step_00000002/manifest.json"
    saved = json.loads(manifest.read_text())
    config = saved["metadata"]["config"]
    del config["optim"]["optimizer"], config["discriminator"]["optim"]["optimizer"], saved["metadata"]["units"]
    manifest.write_text(json.dumps(saved))
    with pytest.raises(InputError, match=r"optim.optimizer = 'muon', but .* was made with 'adam'"):
        train.main(arguments(tmp_path))
    train.main(arguments(tmp_path, optim__optimizer="adam", train__exit_interval=3))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_run_is_steered_at_a_start(tmp_path, capsys):
    train.main(arguments(tmp_path, train__exit_interval=2))
    train.main(arguments(tmp_path, train__exit_interval=3, optim__lr=5e-5))
    assert "optim.lr = 5e-05, and 0.002 up to step 2" in capsys.readouterr().out
    (event,) = (event for event in read_json_lines(tmp_path / "events.jsonl") if event["event"] == "change")
    assert (event["step"], event["field"], event["was"], event["value"]) == (2, "optim.lr", 0.002, 5e-5)
    rates = [line["learning_rate"] for line in lines(tmp_path)]
    assert rates[1] > 1e-4 and rates[2] <= 5e-5


def test_checkpoint_is_a_folder_of_the_tokenizer(whole, tmp_path):
    (folder,) = (whole / "checkpoints").glob("step_*")
    released = load_vision_tokenizer(whole / "tokenizer").identity
    assert load_vision_tokenizer(folder).identity == released
    options = {"checkpoint__init_from": folder, "codebook__kmeans_batches": 0, "train__exit_interval": 1}
    train.main(arguments(tmp_path, **options, optim__lr=0, optim__min_lr=0, train__ema_decay=0))
    weights, source = (dict(load_vision_tokenizer(path).named_parameters()) for path in (
        tmp_path / "checkpoints/step_00000001", folder))  # fmt: skip
    assert all(torch.equal(weights[name], tensor) for name, tensor in source.items())


def test_run_can_be_made_longer_where_no_learning_rate_depends_on_its_length(tmp_path):
    options = {"codebook__start_step": 1, "train__accumulation_steps": 1}
    fixed = {"optim__lr_decay_steps": 30, **options}
    train.main(arguments(tmp_path, train__train_steps=3, **fixed))
    train.main(arguments(tmp_path, train__train_steps=5, **fixed))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 3, 4, 5, 5]
    with pytest.raises(InputError, match=r"train.train_steps = 6, but"):
        train.main(arguments(tmp_path, train__train_steps=6, **options))


def test_tensorboard_has_scalars_and_reconstructions(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(whole / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 31))
    assert [event.step for event in board.Images("reconstruction")] == [10, 20, 30]


def test_full_disk_is_one_line(tmp_path):
    with (
        no_file_beyond(200_000),
        pytest.raises(InputError, match=r"step 4 could not be saved in .* \(.*File too large"),
    ):
        train.main(arguments(tmp_path))


def test_full_disk_at_the_end_is_one_line(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/tokenizer")
    with (
        no_file_beyond(200_000),
        pytest.raises(InputError, match=r"^observe.run_dir: cannot write .*tokenizer .*File too large"),
    ):
        train.main(arguments(tmp_path / "run"))
    assert not (tmp_path / "run/tokenizer/model.safetensors").exists()


@pytest.mark.parametrize(
    ("changed", "refusal"),
    [
        ({"train__accumulation_steps": 0}, "train.accumulation_steps 0: must be at least 1"),
        ({"train__ema_decay": 1.0}, "train.ema_decay 1.0: must be below 1"),
        (
            {"train__compile": "true", "train__device": "cpu", "train__precision": "bf16"},
            "train.compile = true with train.precision = 'bf16'",
        ),
        ({"optim__lr_warmup_steps": 40}, "optim.lr_warmup_steps 40 is not below"),
        ({"codebook__start_step": 30}, "codebook.start_step = 30: must be below train.train_steps = 30"),
    ],
)
def test_settings_that_cannot_work(tmp_path, changed, refusal):
    with pytest.raises(InputError, match=refusal):
        train.main(arguments(tmp_path, **changed))

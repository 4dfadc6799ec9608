"""Bad input to whole programs: exit code 2, one line that names what is wrong, nothing half-written."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pretrain_emu3
from megatron_ext.config import InputError, run_program
from megatron_ext.files import read_json_lines
from megatron_ext.vision import MoVQGAN, VisionTokenizerConfig, save_vision_tokenizer
from tests.integration.fault_rows import ROWS, Row, preprocess, pretrain, text_tokenizer, tokenize
from tests.support.full_disk import no_file_beyond
from tests.support.small_run import write_small_run
from tests.unit.data.samples import CODEBOOK_SIZE, write_tokenized_folder
from tools import inspect_data

VISION = VisionTokenizerConfig(
    codebook_size=CODEBOOK_SIZE, ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=()
)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Everything that is right."""
    folder = tmp_path_factory.mktemp("right")
    write_small_run(folder)
    pictures = {f"photo{number}": (np.full((2, 3), 40 + number), ["a cat sits"]) for number in range(8)}
    write_tokenized_folder(folder / "codes", pictures)
    write_tokenized_folder(folder / "bare", {"lonely": (np.ones((1, 1), int), [])})
    (folder / "media").mkdir()
    for number in range(4):
        picture = np.full((8, 8, 3), 50 * number, dtype=np.uint8)
        Image.fromarray(picture).save(folder / "media" / f"{number}.png")
        (folder / "media" / f"{number}.txt").write_text(f"Picture {number}.")
    torch.manual_seed(0)
    save_vision_tokenizer(MoVQGAN(VISION).eval(), folder / "vision")
    return folder


@pytest.fixture
def workplace(original, tmp_path) -> Path:
    """A copy to damage, with its own paths in config.yaml."""
    folder = tmp_path / "w"
    shutil.copytree(original, folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(str(original), str(folder)))
    return folder


def files(*folders: Path) -> dict[str, int]:
    """Every file with its size, but for a cache, a run's own log, and what the next attempt at a checkpoint removes."""
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    log = ("events.jsonl", "metrics.jsonl", "config.yaml", "provenance.json")
    return {
        str(path): path.stat().st_size
        for path in found
        if path.name not in log
        and not {"tensorboard", "packing_cache"} & {*path.parts}
        and "/.partial-" not in str(path)
    }


def told(row: Row, workplace: Path, out: Path, capsys: pytest.CaptureFixture) -> str:
    """Run the program; its line, after checks that it is one and that nothing is left."""
    out.mkdir(exist_ok=True)
    argv = row.arguments.format(w=workplace, out=out).split()
    before = files(workplace, out)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_program(row.program.main, argv)
    assert end.value.code == 2
    printed = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in printed] == [False] * (len(printed) - 1) + [True], printed
    assert not any("Traceback" in line for line in printed), printed
    assert files(workplace, out) == before
    return printed[-1]


@pytest.mark.parametrize("name", ROWS)
def test_one_line_and_nothing_half_written(name, workplace, tmp_path, monkeypatch, capsys):
    row = ROWS[name]
    row.damage(workplace)
    if row.world_size > 1:
        monkeypatch.setenv("WORLD_SIZE", str(row.world_size))
    line = told(row, workplace, tmp_path / "out", capsys)
    missing = [part for part in row.names if part not in line]
    assert not missing, f"{missing} not in: {line}"


def test_the_table_is_long_enough():
    assert len(ROWS) >= 40


@pytest.mark.parametrize(
    ("row", "most_bytes"),
    [
        (pretrain("--train.train_steps 1", "step 1 could not be saved", "run/checkpoints", "File too large"), 40_000),
        (preprocess("--text [{w}/long.txt]", "output_prefix", "out/set_train", "File too large"), 8_192),
        (tokenize("--inputs [{w}/media]", "output", "codes-00000-00000.tar", "File too large"), 4_096),
        (text_tokenizer("--input [{w}/long.txt] --vocab_size 300", "output", "text.model", "File too large"), 1_024),
    ],
    ids=["checkpoint", "dataset", "codes", "text tokenizer"],
)  # fmt: skip
def test_a_full_disk(row, most_bytes, workplace, tmp_path, capsys):
    (workplace / "long.txt").write_text("a cat sits on the mat\n\n" * 1000)
    with no_file_beyond(most_bytes):
        line = told(row, workplace, tmp_path / "out", capsys)
    assert not [name for name in row.names if name not in line], line


def test_an_unknown_megatron_core(workplace, tmp_path, monkeypatch, capsys):
    """Its metadata, found before the installed one's."""
    metadata = tmp_path / "site" / "megatron_core-0.15.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.15.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    line = told(pretrain(""), workplace, tmp_path / "out", capsys)
    assert "megatron-core 0.15.0 is not supported" in line and "0.16.1" in line


def test_a_run_folder_of_another_configuration(workplace, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    pretrain_emu3.main(pretrain("--train.train_steps 1").arguments.format(w=workplace, out=out).split())
    for arguments, *names in (
        ("--train.seed 7", "train.seed is 7, the run began with", "start anew"),
        ("--model.hidden_size 32", "step_00000001", "was trained with model", "hidden_size 16", "hidden_size 32"),
    ):
        line = told(pretrain(arguments), workplace, out, capsys)
        assert not [name for name in names if name not in line], line
    blend = '--data.train [{{"prefix":"{w}/train"}},{{"prefix":"{w}/valid","weight":3}}] '
    line = told(pretrain(blend), workplace, out, capsys)
    assert "data.train has changed: the run has not read valid: " in line and "data.allow_change true" in line
    allowed = pretrain(f"{blend} --data.allow_change true --train.train_steps 2 --train.global_batch_size 8")
    pretrain_emu3.main(allowed.arguments.format(w=workplace, out=out).split())
    (event,) = [event for event in read_json_lines(out / "run" / "events.jsonl") if event["event"] == "blend"]
    assert (event["step"], event["sample"], event["added"], event["removed"]) == (1, 4, ["valid"], [])
    assert event["shares"] == {"train": 0.25, "valid": 0.75}
    shown = [*allowed.arguments.format(w=workplace, out=out).split(), "--step"]
    capsys.readouterr()
    inspect_data.main([*shown, "3"])
    printed = capsys.readouterr().out
    assert "step 3: samples 12..19" in printed and "NOT the data" not in printed and " of valid" in printed
    with pytest.raises(InputError, match="sample 0 of .* was taken before the blend changed, at sample 4"):
        inspect_data.main([*shown, "1", "--train.global_batch_size", "4"])
    shutil.rmtree(out / "run" / "checkpoints" / "step_00000002")
    (out / "run" / "checkpoints" / "latest").write_text("step_00000001\n")
    other = f"--model.num_layers 2 --checkpoint.init_from {out}/run --observe.run_dir {out}/other"
    line = told(pretrain(other), workplace, out, capsys)
    assert "was trained with model num_layers 1" in line and "num_layers 2" in line
    for damage, *names in (
        (lambda w: next(w.rglob("*.distcp")).write_bytes(b""), "step_00000001 is damaged", ".distcp has 0 bytes"),
        (
            lambda w: (w / "checkpoints" / "latest").write_text("step_00000009"),
            "latest names 'step_00000009'",
        ),
    ):
        damage(out / "run")
        line = told(pretrain(""), workplace, out, capsys)
        assert not [name for name in names if name not in line], line

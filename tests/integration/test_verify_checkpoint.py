"""tools/verify_checkpoint.py on checkpoints of a real run, whole and damaged."""

import io
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import pretrain_emu3
from megatron_ext.checkpoint.examine import damages
from megatron_ext.config import InputError, load
from megatron_ext.config.run import RunConfig
from tests.support.small_run import write_small_run
from tools import verify_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("verify")
    config = write_small_run(folder)
    config |= {"checkpoint": {"save_interval": 2}, "runtime": {"device": "cpu"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    options = ["--config", str(folder / "config.yaml"), "--observe.run_dir", str(folder / "run")]
    pretrain_emu3.train(load(RunConfig, options))
    return folder / "run"


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def verify(place: Path, capsys) -> tuple[int, str]:
    """Exit code and what is printed."""
    code = 0
    try:
        verify_checkpoint.main(["--checkpoint", str(place)])
    except SystemExit as ended:
        code = ended.code
    return code, capsys.readouterr().out


def place_of(folder: Path, name: str) -> tuple[Path, int]:
    """File of weights and position of the middle of a tensor."""
    (found,) = (
        place for index, place in pickle.loads((folder / "decoder" / ".metadata").read_bytes()).storage_data.items()
        if index.fqn == name
    )  # fmt: skip
    return folder / "decoder" / found.relative_path, found.offset + found.length // 2


def flip(path: Path, position: int) -> None:
    """Change the lowest bit of one byte."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_whole_checkpoints(run, capsys):
    assert verify(run, capsys) == (0, "step_00000002: whole\nstep_00000004: whole\n")
    assert verify(run / "checkpoints" / "step_00000004", capsys) == (0, "step_00000004: whole\n")


@pytest.mark.parametrize("name", ["model.embedding.word_embeddings.weight", "model.decoder.final_layernorm.weight"])
def test_a_flipped_bit_is_found_and_its_tensor_named(copy, capsys, name):
    path, position = place_of(copy / "checkpoints" / "step_00000004", name)
    flip(path, position)
    code, printed = verify(copy, capsys)
    assert code == 1
    whole, damaged, line = printed.splitlines()
    assert whole == "step_00000002: whole" and damaged.startswith("step_00000004: damaged; step_00000002 beside it")
    assert line == f"  decoder/{path.name} has other contents: {name}"


def parts_of(folder: Path) -> list[tuple[str, Path, int, int]]:
    """Of each part of a tensor or other entry: name, file of weights, first byte and number of bytes there."""
    table = pickle.loads((folder / "decoder" / ".metadata").read_bytes()).storage_data
    return [(index.fqn, folder / "decoder" / at.relative_path, at.offset, at.length) for index, at in table.items()]


def reads_differently(part: bytes, original: bytes) -> bool:
    """Whether torch, which looks at no checksum, reads another tensor, or none."""
    try:
        found, right = (torch.load(io.BytesIO(content), weights_only=False) for content in (part, original))
    except Exception:  # a damaged archive fails in many ways
        return True
    return not (isinstance(right, torch.Tensor) and found.dtype == right.dtype and torch.equal(found, right))


def test_a_flipped_bit_anywhere_is_found_and_named_wherever_a_tensor_reads_differently(copy):
    """Bits of the weights, moments and the rest, one after the other; torch.load says where it matters."""
    step = copy / "checkpoints" / "step_00000004"
    bits, num_named = random.Random(4), 0
    for name, path, first, length in parts_of(step):
        position = first + bits.randrange(length)
        whole = path.read_bytes()
        flip(path, position)
        (damage,) = damages(step)
        assert damage.file == f"decoder/{path.name}" and damage.what == "has other contents"
        if damage.tensors:
            (named,) = damage.tensors
            assert named.split(" at ")[0] == name, f"byte {position - first} of {length} of {name}"
            num_named += 1
        else:  # bytes between the records of the archive, which align them and say nothing
            changed = path.read_bytes()[first : first + length]
            assert not reads_differently(changed, whole[first : first + length]), (
                f"byte {position - first} of {length} of {name}"
            )
        path.write_bytes(whole)
    assert num_named > 10 and damages(step) == []


def test_a_checkpoint_that_cannot_be_verified_does_not_hide_the_others(copy, capsys):
    steps = copy / "checkpoints"
    for number, change in ((1, ('"format_version": 2', '"format_version": 7')), (3, ('"files"', '"filez"'))):
        shutil.copytree(steps / "step_00000002", steps / f"step_0000000{number}")
        manifest = steps / f"step_0000000{number}" / "manifest.json"
        manifest.write_text(manifest.read_text().replace(*change))
    path, position = place_of(steps / "step_00000004", "model.decoder.final_layernorm.weight")
    flip(path, position)
    code, printed = verify(copy, capsys)
    first, second, third, fourth, damage = printed.splitlines()
    assert code == 1 and second == "step_00000002: whole"
    assert first.startswith("step_00000001: cannot be verified; ") and "checkpoint format 7" in first
    assert third.startswith("step_00000003: cannot be verified; ") and "'files'" in third
    assert fourth.startswith("step_00000004: damaged; ") and damage.startswith("  decoder/")


@pytest.mark.parametrize("when", ["before it is read", "while it is read"])
def test_a_checkpoint_that_the_run_removes_meanwhile_is_left_out(copy, capsys, monkeypatch, when):
    def removing(folder: Path):
        if folder.name == "step_00000002" and when == "before it is read":
            shutil.rmtree(folder)
        found = damages(folder)
        if folder.name == "step_00000002":
            shutil.rmtree(folder)
        return found

    monkeypatch.setattr(verify_checkpoint, "damages", removing)
    assert verify(copy, capsys) == (0, "step_00000004: whole\n")
    with pytest.raises(InputError, match="step_00000002' is not there"):
        verify(copy / "checkpoints" / "step_00000002", capsys)


def test_other_files_are_checked_too(copy, capsys):
    step = copy / "checkpoints" / "step_00000002"
    flip(step / "config.yaml", 3)
    (step / "vocabulary" / next(path.name for path in (step / "vocabulary").iterdir())).unlink()
    code, printed = verify(step, capsys)
    assert code == 1 and "config.yaml has other contents" in printed and "is missing" in printed

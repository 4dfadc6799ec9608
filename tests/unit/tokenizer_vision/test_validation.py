"""Evaluation on the way: its numbers by hand, held-out media, and a bound on what it keeps and shows."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from megatron_ext.config import InputError, load
from megatron_ext.files import read_json_lines
from megatron_ext.vision import MoVQGAN, VisionTokenizerConfig, from_uint8, to_uint8
from tokenizer_train.vision import train, validation
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig
from tokenizer_train.vision.quality import ssim
from tokenizer_train.vision.validation import Validation, save_grid

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples/movqgan_tiny_cpu.yaml"
SIDE = 16


def configured(**options: object) -> VisionTokenizerTrainingConfig:
    given = [f"--{name.replace('__', '.')}={value}" for name, value in options.items()]
    return load(VisionTokenizerTrainingConfig, [f"--config={EXAMPLE}", f"--media.size={SIDE}", *given])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    small = VisionTokenizerConfig(codebook_size=32, ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=())
    return MoVQGAN(small).train()


class Given:
    """Media whose pixels are random and whose samples are numbers."""

    def __init__(self, pictures: int, clips: int, bad: tuple[int, ...] = ()) -> None:
        self.pictures, self.clips = list(range(pictures)), list(range(100, 100 + clips))
        self.bad, self.asked = bad, []

    def whole(self, sample: int, max_frames: int) -> np.ndarray | None:
        self.asked.append(max_frames)
        if sample in self.bad:
            return None
        shape = (SIDE, SIDE, 3) if sample < 100 else (max_frames, SIDE, SIDE, 3)
        return np.random.default_rng(sample).integers(0, 256, shape, dtype=np.uint8)


def validation_of(media: Given, distances=None, **options: object) -> Validation:
    return Validation(configured(model__codebook_size=32, **options), media, distances or {}, print)


class Distance(nn.Module):
    def forward(self, drawn, wanted):
        return (drawn - wanted).abs().mean((1, 2, 3)) if drawn.ndim == 4 else (drawn - wanted).abs().mean()


def test_numbers_by_hand(model):
    media = Given(3, 2, bad=(1,))
    line, grid = validation_of(media, {"plain": Distance()}, train__eval_clip_frames=9).judge(model)
    assert model.training and set(media.asked) == {8}, "whole chunks of 4 frames"
    model.eval()
    codes, expected = [], {"psnr": [], "ssim": [], "plain": []}
    with torch.no_grad():
        for sample in (0, 2, 100, 101):
            original = media.whole(sample, 8)
            pixels = from_uint8(original)[None]
            frames = pixels.reshape(-1, 4, *pixels.shape[-3:]) if sample >= 100 else pixels
            codes.append(torch.cat([model.encode(part[None]) for part in frames]) if sample >= 100 else
                         model.encode(pixels))  # fmt: skip
            drawn = torch.cat([model.decode(part[None])[0] for part in codes[-1]])
            whole = to_uint8(drawn).reshape(original.shape)
            error = np.mean((whole.astype(float) - original) ** 2)
            expected["psnr"].append(10 * np.log10(255**2 / error))
            as_frames = (-1, SIDE, SIDE, 3)
            expected["ssim"].append(ssim(original.reshape(as_frames), whole.reshape(as_frames)).mean())
            expected["plain"].append((drawn.reshape(pixels.shape) - pixels).abs().mean().item())
    model.train()
    for name, values in expected.items():
        assert line[f"valid_{name}"] == pytest.approx(np.mean(values[:2]), rel=1e-6)
        assert line[f"valid_{name}_clips"] == pytest.approx(np.mean(values[2:]), rel=1e-6)
    used = torch.cat([part.flatten() for part in codes]).unique()
    assert line["valid_codes_used"] == len(used) and len(grid) == 2 + 2 * 8


def test_nothing_to_judge(model):
    assert validation_of(Given(1, 0, bad=(0,))).judge(model) == ({}, [])


def test_the_grid_is_bounded(model, monkeypatch, tmp_path):
    monkeypatch.setattr(validation, "SHOWN_PIXELS", 2 * 20 * SIDE**2)  # twenty frames and their reconstructions
    _, grid = validation_of(Given(30, 5), train__eval_samples=30).judge(model)
    pictures, clips = Given(30, 5), [frame for number in (100, 101) for frame in Given(0, 2).whole(number, 16)[:8]]
    assert [len(grid[:10]), len(grid[10:])] == [10, 10], "half for each kind"
    assert all(np.array_equal(shown, pictures.whole(n, 0)) for n, (shown, _) in enumerate(grid[:10]))
    assert all(np.array_equal(shown, frame) for (shown, _), frame in zip(grid[10:], clips[:10], strict=True))
    save_grid(grid, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (16 * SIDE, 2 * (2 * SIDE + 2))


@pytest.mark.parametrize("size", [64, 512, 2048])
def test_the_grid_of_a_large_training_can_be_opened(size):
    """Pillow refuses 179 million pixels; lines and a last row that is not full come on top."""
    made = Validation(configured(media__size=size), Given(64, 64), {}, print)
    assert 1 <= 2 * made._shown_of_a_kind * 2 * size**2 <= max(validation.SHOWN_PIXELS, 4 * size**2)


def test_held_out_media(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    source = sorted((ROOT / "examples/media/images").glob("*.jpg"))
    shutil.copy(source[0], held_out / "a.jpg")
    (held_out / "b.jpg").write_bytes(source[1].read_bytes()[:900])
    options = {
        "model.codebook_size": 32, "model.ch_mult": "[1,1]", "model.attn_resolutions": "[]", "media.size": SIDE,
        "codebook.start_step": 0, "codebook.kmeans_batches": 1, "train.train_steps": 2, "optim.lr_warmup_steps": 0,
        "train.eval_interval": 1, "train.num_threads": 1, "observe.run_dir": tmp_path / "run",
        "observe.tensorboard": "false", "train.freeze_batch_norm_step": 1, "media.valid_inputs": f"[{held_out}]",
    }  # fmt: skip
    arguments = [f"--config={EXAMPLE}", *(f"--{name}={value}" for name, value in options.items())]
    train.main(arguments)
    lines = [line for line in read_json_lines(tmp_path / "run/metrics.jsonl") if "valid_psnr" in line]
    assert [line["step"] for line in lines] == [1, 2] and "valid_psnr_clips" not in lines[0]
    assert capsys.readouterr().out.count(f"evaluation skips {held_out / 'b.jpg'}") == 1
    with Image.open(tmp_path / "run/reconstruction.png") as grid:
        assert grid.size == (SIDE, 2 * SIDE + 2), "one picture"
    empty, damaged = tmp_path / "empty", tmp_path / "damaged"
    empty.mkdir()
    damaged.mkdir()
    shutil.copy(held_out / "b.jpg", damaged)
    for inputs, told in (
        (empty, "holds no picture"),
        (tmp_path / "absent", "absent"),
        (damaged, r"media.valid_inputs = .*damaged.*: none of 1 samples can be used"),
    ):
        with pytest.raises(InputError, match=told):
            train.main([*arguments, f"--media.valid_inputs=[{inputs}]", f"--observe.run_dir={tmp_path / inputs.name}"])
    assert not (tmp_path / "damaged/metrics.jsonl").read_text(), "found before the first step"


def test_a_bad_sample_takes_no_place_of_the_evaluated(tmp_path):
    pictures = sorted((ROOT / "examples/media/images").glob("*.jpg"))[:3]
    for number, picture in enumerate(pictures):
        content = picture.read_bytes()
        (tmp_path / f"{number}.jpg").write_bytes(content[: len(content) // 2] if number == 0 else content)
    said = []
    config = configured(media__valid_inputs=f"[{tmp_path}]", train__eval_samples=2)
    media = Validation(config, Given(0, 0), {}, said.append).media
    assert [sample.key for sample in media.pictures] == ["1", "2"]
    assert len(said) == 1 and "0.jpg" in said[0], "its header is whole: decoding tells"

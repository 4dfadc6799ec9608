"""The evaluation program: folders of three kinds side by side, references, clips, refusals."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from megatron_ext.config import InputError
from megatron_ext.hf import vision_tensors
from megatron_ext.hf.vision import vq_config
from megatron_ext.vision import MoVQGAN, load_vision_tokenizer, save_vision_tokenizer
from tests.support.releases import whole
from tests.support.small_models import VISION
from tokenizer_train.vision import evaluate
from tokenizer_train.vision.quality import psnr

CLIP = "examples/media/clips"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One tokenizer in our layout and as transformers' class stores it, and the pictures it sees."""
    root = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    model = MoVQGAN(VISION).eval()
    with torch.no_grad():
        latents = model.latents(torch.rand(4, 3, 64, 64) * 2 - 1).movedim(1, -1).reshape(-1, VISION.embed_dim)
        model.quantize.embedding.weight.copy_(latents[torch.randperm(len(latents))[: VISION.codebook_size]])
        model.decoder.conv_out.weight.mul_(0.1)
    save_vision_tokenizer(model, root / "ours")
    theirs = Emu3VQVAE(Emu3VQVAEConfig(**vq_config(VISION)))
    theirs.load_state_dict(whole(vision_tensors(model)))
    theirs.save_pretrained(root / "theirs")
    (root / "media").mkdir()
    for index in range(3):
        noise = np.random.default_rng(index).integers(0, 256, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((60, 40), Image.Resampling.BICUBIC).save(root / f"media/{index}.png")
    return root


def run(folders, *options: str) -> dict:
    arguments = ["--tokenizers", f"[{folders / 'ours'},hf={folders / 'theirs'}]", f"--output={folders / 'out'}"]
    evaluate.main([*arguments, "--sizes=[32]", "--device=cpu", "--num_threads=1", *options])
    return json.loads((folders / "out/report.json").read_text())


def test_folders_of_all_kinds_and_references_stand_side_by_side(folders, capsys):
    report = run(folders, f"--inputs=[{folders / 'media'}]", "--batch_size=2")
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["ours", "hf", "bicubic 8x", "JPEG, bits of ours"]
    for name in ("psnr", "ssim", "perceptual", "rfid", "codes_used", "perplexity", "vision_tokenizer"):
        assert rows["ours"][name] == rows["hf"][name], name
    ours = rows["ours"]
    assert ours["samples"] == 3 and ours["tokens_per_sample"] == 16
    assert ours["bits_per_pixel"] == pytest.approx(math.log2(48) / 64)
    assert rows["JPEG, bits of ours"]["bits_per_pixel"] <= ours["bits_per_pixel"]
    assert ours["rfid_network"] == ours["perceptual_network"] == "efficientnet_lite0"
    assert rows["bicubic 8x"]["psnr"] > ours["psnr"], "random weights beat nothing"
    assert "FID in" in (shown := capsys.readouterr().out) and "efficientnet_lite0" in shown
    model = load_vision_tokenizer(folders / "ours")
    for index, found in enumerate(ours["psnr_of_samples"]):
        square = (
            Image.open(folders / f"media/{index}.png").crop((10, 0, 50, 40)).resize((32, 32), Image.Resampling.BICUBIC)
        )
        pixels = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        decoded = (model.decode(model.encode(pixels))[0].permute(1, 2, 0) + 1) * 127.5
        expected = psnr(np.asarray(square), decoded.round().clamp(0, 255).byte().numpy())
        assert found == pytest.approx(expected, abs=1e-4)
    grid = Image.open(folders / "out/grid_32.png")
    assert grid.size == (32 * (1 + 2 * 4), 32 * 3 + 14)
    assert (np.asarray(grid)[-32:, :32] == np.asarray(square)).all()


def test_clips_whole_and_in_chunks(folders):
    options = (f"--inputs=[{CLIP}]", "--limit=1", "--clips.max_frames=10", "--perceptual=none", "--frechet=none")
    chunks, stream = (run(folders, *options, f"--clip_mode={mode}")["rows"] for mode in ("chunks", "stream"))
    assert (
        [row["kind"] for row in chunks] == ["video"] * 4 and "perceptual" not in chunks[0] and "rfid" not in chunks[0]
    )
    assert chunks[0]["frames"] == 8 and chunks[0]["tokens_per_sample"] == 2 * 16
    assert chunks[0]["bits_per_pixel"] == pytest.approx(math.log2(48) / 64 / 4)
    assert chunks[0]["psnr"] == chunks[1]["psnr"] != stream[0]["psnr"] == stream[1]["psnr"]
    assert chunks[2:] == stream[2:], "the references know no modes"
    assert chunks[3]["bits_per_pixel"] <= chunks[0]["bits_per_pixel"]


def test_a_bad_picture_counts_once_over_all_sizes(folders, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"damaged")
    inputs = f"--inputs=[{folders / 'media'},{tmp_path / 'bad.png'}]"
    quick = ("--perceptual=none", "--frechet=none", "--references=false")
    report = run(folders, inputs, "--sizes=[32,40]", "--max_bad_fraction=0.25", *quick)
    [(source, _)] = report["skipped"]
    assert source == str(tmp_path / "bad.png") and {row["samples"] for row in report["rows"]} == {3}


def test_bad_input_gets_one_line(folders, tmp_path):
    media = f"--inputs=[{folders / 'media'}]"
    for options, message in (
        (["--sizes=[36]"], "36 must be a multiple of 8"),
        (["--tokenizers", f"[a={folders / 'ours'},a={folders / 'theirs'}]"], "two are called 'a'"),
        (["--tokenizers", f"[{tmp_path}]"], "config.json: cannot be read"),
        (["--perceptual=lpips_vgg16"], "needs vgg16_weights and lpips_heads"),
        (["--sizes=[]"], "sizes is empty"),
    ):
        with pytest.raises(InputError, match=message):
            run(folders, media, *options)
    (tmp_path / "bad.png").write_bytes(b"damaged")
    with pytest.raises(InputError, match="1 of 1 samples cannot be used"):
        run(folders, f"--inputs=[{tmp_path}]")

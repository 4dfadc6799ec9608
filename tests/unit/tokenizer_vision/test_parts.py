"""Initial weights, codebook care, batches and evaluation of the vision tokenizer's training."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ext.config import InputError
from megatron_ext.vision import MoVQGAN, VisionTokenizerConfig
from tokenizer_train.vision.codebook import perplexity
from tokenizer_train.vision.config import MediaConfig
from tokenizer_train.vision.data import TrainingMedia
from tokenizer_train.vision.evaluate import psnr
from tokenizer_train.vision.initialize import near_identity


def test_near_identity_passes_the_signal():
    torch.manual_seed(0)
    config = VisionTokenizerConfig(codebook_size=8, ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(2,))
    model = MoVQGAN(config).eval()
    near_identity(model)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        spatial = model.encoder.frames(pixels)
        latents = model.latents(pixels)[:, :, 0]
        expected = torch.nn.functional.silu(torch.nn.functional.silu(spatial + 1) + 1) - 1.6
        # 0.02 of noise on 4 x 36 taps: differences of a few tenths against a spread of about one.
        assert (latents - expected).abs().mean() < 0.3 * expected.std()
        one_block = model.decoder.up[0].block[1]
        hidden, condition = torch.randn(2, 32, 16, 16), torch.randn(2, 4, 4, 4)
        assert torch.equal(one_block(hidden, condition), hidden)


def test_perplexity_and_psnr():
    assert perplexity(torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(4)
    assert perplexity(torch.tensor([9, 0])) == pytest.approx(1)
    zeros = np.zeros((2, 2, 3), np.uint8)
    assert psnr(zeros, zeros + 255) == pytest.approx(0)
    assert psnr(zeros, zeros + 1) == pytest.approx(20 * np.log10(255))


@pytest.fixture
def folder(tmp_path):
    for index in range(5):
        Image.new("RGB", (20, 12), (40 * index, 0, 0)).save(tmp_path / f"{index}.png")
    return tmp_path


def whole_pictures(media: TrainingMedia, step: int) -> list[int]:
    """Numbers of the pictures at `step`, from their colour."""
    return [round((pixels[0, 0, 0].item() + 1) * 127.5 / 40) for pixels in media.batch(step)]


def test_batches_are_a_function_of_seed_and_step(folder):
    config = MediaConfig(inputs=[str(folder)], size=8, batch_size=5, augmented_share=0.4)
    first, second = (TrainingMedia(config, seed=1, chunk_frames=4) for _ in range(2))
    batches = {step: first.batch(step) for step in (1, 2, 3)}
    assert batches[1].shape == (5, 3, 8, 8)
    assert all(torch.equal(second.batch(step), batches[step]) for step in (3, 1, 2))
    other = TrainingMedia(config, seed=2, chunk_frames=4)
    assert any(not torch.equal(other.batch(step), batches[step]) for step in batches)


def test_every_epoch_has_every_picture_once(folder):
    config = MediaConfig(inputs=[str(folder)], size=8, batch_size=2, augmented_share=0)
    media = TrainingMedia(config, seed=1, chunk_frames=4)
    seen = [number for step in range(1, 6) for number in whole_pictures(media, step)]
    assert sorted(seen[:5]) == sorted(seen[5:]) == list(range(5))
    assert seen[:5] != seen[5:]


def test_unusable_pictures_are_passed_over_and_named(folder):
    (folder / "2.png").write_bytes(b"damaged")
    strict = MediaConfig(inputs=[str(folder)], size=8, batch_size=5, augmented_share=0)
    with pytest.raises(InputError, match=r"1 of 5 samples .* media.max_bad_fraction 0.01 \(.*2.png: not a readable"):
        TrainingMedia(strict, seed=1, chunk_frames=4).batch(1)
    config = replace(strict, max_bad_fraction=1.0)
    media = TrainingMedia(config, seed=1, chunk_frames=4)
    assert sorted(whole_pictures(media, 1)) == [0, 1, 3, 3, 4]
    assert media.bad.lines() == [f"skipped {folder / '2.png'}: {media.bad.reasons[str(folder / '2.png')]}"]
    for path in folder.glob("*.png"):
        path.write_bytes(b"damaged")
    with pytest.raises(InputError, match="none of 5"):
        TrainingMedia(config, seed=1, chunk_frames=4).batch(1)


def test_clips_wanted_but_absent(folder):
    with pytest.raises(InputError, match="hold no clip"):
        TrainingMedia(MediaConfig(inputs=[str(folder)], clip_share=0.5), seed=1, chunk_frames=4)

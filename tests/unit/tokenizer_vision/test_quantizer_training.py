"""The training program with the other ways to quantize: moving averages, and Emu3.5's quantizer."""

import pytest
import torch
from PIL import Image

from megatron_ext.files import read_json_lines
from megatron_ext.vision import load_vision_tokenizer
from tokenizer_train.vision import train


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "media").mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(3):
        pixels = torch.randint(256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((32, 32)).save(tmp_path / f"media/{index}.png")
    return [
        f"--media.inputs=[{tmp_path / 'media'}]", "--media.size=32", "--media.batch_size=3", "--train.precision=fp32",
        f"--observe.run_dir={tmp_path / 'run'}", "--observe.tensorboard=false", "--train.num_threads=1",
        "--train.device=cpu", "--train.train_steps=6", "--train.eval_interval=100", "--model.ch=32",
        "--model.num_res_blocks=1", "--model.attn_resolutions=[]", "--optim.lr_warmup_steps=0",
    ]  # fmt: skip


def trained(arguments: list[str], tmp_path) -> tuple[list[dict], torch.Tensor]:
    """Metrics and codes of a run."""
    train.main(arguments)
    lines = [line for line in read_json_lines(tmp_path / "run/metrics.jsonl") if "loss" in line]
    return lines, load_vision_tokenizer(tmp_path / "run/tokenizer").quantize.embedding.weight.detach()


def test_moving_averages_need_no_gradient(arguments, tmp_path):
    """At learning rate 0 the latents stay, and the codes come closer to them by moving averages alone."""
    options = ["--codebook.update=ema", "--codebook.ema_decay=0.5", "--loss.codebook=0", "--codebook.kmeans_batches=1"]
    options += ["--codebook.kmeans_iterations=0", "--model.codebook_size=8", "--model.ch_mult=[1,1]"]
    options += ["--optim.lr=0", "--optim.min_lr=0", "--train.freeze_batch_norm_step=1", "--media.augmented_share=0"]
    lines, codes = trained([*arguments, *options], tmp_path)
    assert codes.std() > 0
    # Measured: 0.83 of it is left; all of it where nothing moves.
    assert lines[-1]["loss_commitment"] < 0.9 * lines[1]["loss_commitment"]
    assert {"codes_perplexity", "codes_perplexity_average"} < set(lines[0])


def test_ibq_trains_every_code(arguments, tmp_path):
    options = ["--model.quantizer=ibq", "--model.codebook_size=70000", "--model.embed_dim=8", "--model.z_channels=8"]
    options += ["--model.ch_mult=[1,1,1,1,1]", "--model.temporal_downsample_factor=1", "--loss.index_propagation=1"]
    options += ["--loss.codebook=0.25", "--loss.commitment=1", "--loss.entropy=0.05", "--loss.entropy_temperature=1"]
    options += ["--codebook.kmeans_batches=0", "--train.init=emu3", "--optim.weight_decay=0", "--optim.lr=1e-3"]
    lines, first = trained([*arguments, *options, "--train.train_steps=1"], tmp_path)
    assert {"loss_index_propagation", "loss_entropy", "loss_codebook", "loss_commitment"} < set(lines[0])
    again = [argument.replace("/run", "/again") for argument in [*arguments, *options, "--train.train_steps=2"]]
    train.main(again)
    second = load_vision_tokenizer(tmp_path / "again/tokenizer").quantize.embedding.weight.detach()
    moved = ((second - first).abs() > 0).any(1)
    assert moved.float().mean() > 0.99, "12 latents have 12 codes, and all others have a gradient too"

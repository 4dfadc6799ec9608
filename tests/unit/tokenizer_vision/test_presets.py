"""The shipped recipes: what acts is what upstream publishes or executes, and they train when cut to seconds."""

from pathlib import Path

import pytest

from megatron_ext.config import load
from megatron_ext.files import read_json_lines
from tokenizer_train.vision import train
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig
from tokenizer_train.vision.losses import weights_at

ROOT = Path(__file__).parents[3]


def preset(name: str) -> VisionTokenizerTrainingConfig:
    return load(VisionTokenizerTrainingConfig, [f"--config={ROOT / f'examples/{name}.yaml'}"])


def acting(config: VisionTokenizerTrainingConfig, step: int) -> dict[str, float]:
    return {name: weight for name, weight in weights_at(config.loss, step).items() if weight}


def test_sbers_recipe_is_the_executed_one():
    """ai-forever/MoVQGAN: loss = mean(L2 + 0.1 LPIPS) + 0.1 adversarial + quantizer, from the first step."""
    config = preset("movqgan_sber")
    legacy = {"codebook": 0.25, "commitment": 1.0}
    assert acting(config, 1) == {"l2": 1.0, "lpips_vgg16": 0.1, "adversarial": 0.1} | legacy
    for optim in (config.optim, config.discriminator.optim):
        assert (optim.lr, optim.adam_beta1, optim.adam_beta2, optim.weight_decay) == (1e-4, 0.5, 0.9, 0)
        assert (optim.clip_grad, optim.clip_grad_value, optim.lr_decay_style) == (0, 1.0, "constant")
    assert (config.train.ema_decay, config.train.precision, config.media.size) == (0.9999, "fp32", 256)
    assert (config.model.codebook_size, config.model.spatial_factor, config.discriminator.num_layers) == (16384, 8, 2)


def test_emu3s_recipe_has_the_papers_losses():
    """Arxiv 2409.18869: L2, LPIPS, GAN and commitment, from a 2D checkpoint, 32,768 codes of 4x8x8 pixels."""
    config = preset("movqgan_emu3")
    late = acting(config, config.loss.adversarial_start_step + 1)
    assert set(late) == {"l2", "lpips_vgg16", "adversarial", "codebook", "commitment"}
    assert set(late) - set(acting(config, 1)) == {"adversarial"}
    assert config.checkpoint.init_from and config.media.clip_share > 0
    assert (config.model.codebook_size, config.model.temporal_downsample_factor) == (32768, 4)
    assert config.media.size % config.model.spatial_factor == 0


@pytest.mark.parametrize("name", ["movqgan_sber", "movqgan_emu3"])
def test_a_recipe_trains_when_cut_to_seconds(name, tmp_path):
    config = preset(name)
    options = {
        "media.inputs": f"[{ROOT / 'examples/media/images'},{ROOT / 'examples/media/clips'}]",
        "media.size": 32,
        "media.batch_size": 4,
        "model.codebook_size": 16,
        "model.ch": 32,
        "model.ch_mult": "[1,1]",
        "model.num_res_blocks": 1,
        "model.attn_resolutions": "[]",
        "loss.lpips_vgg16": 0,
        "loss.efficientnet_lite0": config.loss.lpips_vgg16,
        "loss.adversarial_start_step": 0,
        "discriminator.start_step": 0,
        "discriminator.width": 8,
        "discriminator.optim.lr_warmup_steps": 1,
        "optim.lr_warmup_steps": 1,
        "train.train_steps": 4,
        "train.num_threads": 1,
        "train.recompute_min_side": 0,
        "train.eval_samples": 1,
        "checkpoint.init_from": "null",
        "observe.run_dir": tmp_path / "run",
        "observe.tensorboard": "false",
    }
    file = f"--config={ROOT / f'examples/{name}.yaml'}"
    train.main([file, *(f"--{key}={value}" for key, value in options.items())])
    lines = [line for line in read_json_lines(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert len(lines) == 4
    for line in lines:
        assert {"loss_efficientnet_lite0", "loss_adversarial", "loss_discriminator", "weight_commitment"} < set(line)
    assert (tmp_path / "run/tokenizer/model.safetensors").exists()

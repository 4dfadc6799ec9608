"""The vision tokenizer's training on a GPU: bf16, pictures and clips, GAN, recomputation, a resume, compilation, the
decoder alone. NCCL with one rank. No bound here has been measured yet."""

from pathlib import Path

import pytest
import torch

from megatron_ext.files import read_json_lines
from megatron_ext.vision import load_vision_tokenizer
from tokenizer_train.vision import train

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "media.inputs": f"[{ROOT / 'examples/media/images'},{ROOT / 'examples/media/clips'}]",
    "media.clip_share": 0.5,
    "loss.adversarial": 0.1,
    "loss.adversarial_start_step": 2,
    "loss.adversarial_scale": "adaptive",
    "discriminator.width": 16,
    "codebook.start_step": 1,
    "codebook.kmeans_batches": 2,
    "optim.lr_warmup_steps": 1,
    "train.train_steps": 8,
    "train.accumulation_steps": 2,
    "train.precision": "bf16",
    "train.recompute_min_side": 64,
    "train.freeze_batch_norm_step": 6,
    "train.eval_interval": 4,
    "train.eval_samples": 2,
    "train.device": "cuda",
    "checkpoint.save_interval": 3,
    "observe.tensorboard": "false",
}


def trained(run_dir: Path, **changed: object) -> list[dict]:
    """The metrics of a run, without what depends on the clock."""
    options = OPTIONS | {name.replace("__", "."): value for name, value in changed.items()}
    given = [f"--{name}={value}" for name, value in options.items()]
    train.main([f"--config={ROOT / 'examples/movqgan_tiny_cpu.yaml'}", *given, f"--observe.run_dir={run_dir}"])
    found = read_json_lines(run_dir / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "timing"} for line in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, trained(folder, train__deterministic="true")


def test_every_part_of_the_recipe_runs(whole):
    folder, found = whole
    steps = [line for line in found if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert {"loss_adversarial", "loss_discriminator", "loss_commitment", "codes_perplexity"} < set(steps[-1])
    timing = [line["timing"] for line in read_json_lines(folder / "metrics.jsonl") if "loss" in line]
    assert all(line["peak_memory_gib"] > 0 for line in timing)
    assert all("valid_psnr_clips" in line for line in found if "loss" not in line)


def test_a_run_that_stopped_goes_on_to_the_same_bits(whole, tmp_path):
    folder, expected = whole
    trained(tmp_path, train__deterministic="true", train__exit_interval=4)
    assert trained(tmp_path, train__deterministic="true") == expected
    mine, other = (load_vision_tokenizer(run / "tokenizer") for run in (tmp_path, folder))
    assert mine.digest == other.digest


@pytest.mark.parametrize("changed", [{"train__recompute_min_side": 0}, {"train__compile": "true"}])
def test_kept_and_compiled_networks_train_alike(whole, tmp_path, changed):
    """The first step, before rounding grows: recomputation is exact, fused kernels round otherwise."""
    changed = {"train__recompute_min_side": 0} | changed
    first = trained(tmp_path, train__exit_interval=1, **changed)[0]
    assert first["loss"] == pytest.approx(whole[1][0]["loss"], rel=2e-2)
    assert first["grad_norm"] == pytest.approx(whole[1][0]["grad_norm"], rel=5e-2)


def test_decoder_alone_leaves_the_codes(whole, tmp_path):
    source = whole[0] / "tokenizer"
    idle = {"loss__codebook": 0, "loss__commitment": 0, "codebook__kmeans_batches": 0, "codebook__start_step": 0}
    idle |= {"codebook__restart_until_step": 0, "checkpoint__init_from": source, "train__trained": "decoder"}
    trained(tmp_path, **idle)
    before, after = load_vision_tokenizer(source), load_vision_tokenizer(tmp_path / "tokenizer")
    assert after.identity == before.identity and after.digest != before.digest
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert torch.equal(after.encode(pixels), before.encode(pixels))

"""Training the decoder alone: the codes stay, to the last bit, and so does all that is made of them."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ext.config import InputError, load
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.files import read_json_lines
from megatron_ext.runtime import Topology
from megatron_ext.vision import MoVQGAN, VisionTokenizerConfig, load_vision_tokenizer, save_vision_tokenizer
from tests.unit.vision.test_movqgan import random_tokenizer
from tokenizer_train.vision import train
from tokenizer_train.vision.config import VisionOptimConfig, VisionTokenizerTrainingConfig
from tokenizer_train.vision.decoder_alone import train_decoder_alone
from tokenizer_train.vision.optimizer import NetworkOptimizer
from tokenizer_train.vision.parallel import Replicas
from tokenizer_train.vision.step import TrainStep

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples/movqgan_finetune_decoder.yaml"
SMALL = VisionTokenizerConfig(codebook_size=64, ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=())
OPTIONS = {
    "media.inputs": f"[{ROOT / 'examples/media/images'},{ROOT / 'examples/media/clips'}]",
    "media.size": 32,
    "media.batch_size": 4,
    "model.codebook_size": SMALL.codebook_size,
    "model.ch": SMALL.ch,
    "model.ch_mult": "[1,1]",
    "model.num_res_blocks": SMALL.num_res_blocks,
    "model.attn_resolutions": "[]",
    "loss.lpips_vgg16": 0,
    "loss.adversarial_start_step": 1,
    "loss.adversarial_scale": "adaptive",
    "discriminator.width": 8,
    "discriminator.num_layers": 2,
    "discriminator.optim.lr_warmup_steps": 1,
    "optim.optimizer": "muon",
    "optim.lr": 1e-3,
    "optim.lr_warmup_steps": 1,
    "optim.weight_decay": 0.1,
    "train.train_steps": 6,
    "train.accumulation_steps": 2,
    "train.precision": "fp32",
    "train.recompute_min_side": 16,
    "train.ema_decay": 0.9,
    "train.freeze_batch_norm_step": 4,
    "train.num_threads": 1,
    "train.eval_interval": 3,
    "train.eval_samples": 1,
    "observe.tensorboard": "false",
}


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """The folder of a tokenizer with weights, codes and running statistics of all sorts."""
    folder = tmp_path_factory.mktemp("released")
    save_vision_tokenizer(random_tokenizer(SMALL), folder)
    return folder


def arguments(released: Path, run_dir: Path, **changed: object) -> list[str]:
    options = OPTIONS | {"checkpoint.init_from": released, "observe.run_dir": run_dir}
    options |= {name.replace("__", "."): value for name, value in changed.items()}
    return [f"--config={EXAMPLE}", *(f"--{name}={value}" for name, value in options.items())]


def encoding_half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if not name.startswith(("decoder.", "post_quant_conv."))}


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())


def test_codes_stay_while_everything_else_learns(released, tmp_path, capsys):
    """Muon and AdamW with decay, averaged weights, adaptive GAN, recomputation, accumulation, two starts of a run."""
    train.main(arguments(released, tmp_path / "run", train__exit_interval=2))
    train.main(arguments(released, tmp_path / "run"))
    train.main(arguments(released, tmp_path / "whole"))
    assert "its decoder alone learns" in capsys.readouterr().out
    before, after = load_vision_tokenizer(released), load_vision_tokenizer(tmp_path / "run/tokenizer")
    pixels = torch.rand(3, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for batch in (pixels[:, 0], pixels):
        codes = before.encode(batch)
        assert torch.equal(after.encode(batch), codes) and len(codes.unique()) > 8
        assert not torch.equal(after.decode(codes), before.decode(codes))
    state = torch.load(next((tmp_path / "run/checkpoints").glob("step_*/state.pt")), weights_only=True)
    kept = encoding_half(before.state_dict())
    assert any("running_mean" in name for name in kept) and any("embedding" in name for name in kept)
    for tensors in (after.state_dict(), state["model"], state["average"]):
        assert equal(encoding_half(tensors), kept)
    weights = dict(before.named_parameters())
    learnt = {name for name, weight in after.named_parameters() if not torch.equal(weight, weights[name])}
    assert learnt == weights.keys() - kept.keys(), "all of the decoder and nothing else"
    moments = len(state["optimizer"]["state"]) + len(state["optimizer"]["muon"]["state"])
    assert moments == len(learnt)
    whole = load_vision_tokenizer(tmp_path / "whole/tokenizer")
    assert whole.digest == after.digest != before.digest
    assert whole.identity == after.identity == before.identity
    lines = [line for line in read_json_lines(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert {"loss_adversarial", "codes_perplexity"} < set(lines[-1]) and "loss_commitment" not in lines[-1]


class Pictures:
    """One batch of two pictures and one of two clips."""

    def batch(self, step: int, accumulation_index: int = 0) -> torch.Tensor:
        shape = (2, 3, 16, 16) if step % 2 else (2, 4, 3, 16, 16)
        return torch.rand(shape, generator=torch.Generator().manual_seed(step)) * 2 - 1


def made(config: VisionTokenizerTrainingConfig, model: MoVQGAN, topology: Topology) -> TrainStep:
    if config.train.trained == "decoder":
        train_decoder_alone(model)
    optimizer = NetworkOptimizer(model, config.optim, config.train.train_steps)
    return TrainStep(config, model, optimizer, Pictures(), Replicas(topology))


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_the_optimizer_has_what_learns_and_nothing_else(optimizer):
    """What has no gradient costs it no memory, and no weight decay can come to it."""
    model = MoVQGAN(SMALL)
    train_decoder_alone(model)
    made = NetworkOptimizer(model, VisionOptimConfig(optimizer=optimizer), 10)
    held = {id(weight) for part in (made.adam, made.muon) if part for group in part.param_groups
            for weight in group["params"]}  # fmt: skip
    learns = {id(weight) for half in (model.decoder, model.post_quant_conv) for weight in half.parameters()}
    assert held == learns == {id(weight) for weight in made.parameters}


def test_a_step_has_the_decoders_gradient_and_computes_no_other(released, tmp_path):
    plain = {"loss__adversarial": 0, "train__accumulation_steps": 1, "train__recompute_min_side": 0, "optim__lr": 0,
             "optim__min_lr": 0, "optim__clip_grad": 0, "optim__optimizer": "adam"}  # fmt: skip
    flops = {}
    with Topology.alone(RuntimeConfig(device="cpu", num_threads=1)) as topology:
        for trained in ("decoder", "all"):
            given = arguments(released, tmp_path, train__trained=trained, **plain)
            step = made(load(VisionTokenizerTrainingConfig, given), load_vision_tokenizer(released).train(), topology)
            for number in (1, 2):
                model, batch = load_vision_tokenizer(released).train(), Pictures().batch(number)
                with torch.no_grad():
                    model.encoder.eval()
                    vectors = model.quantize.lookup(model.quantize.assign(model.latents(batch)))
                with FlopCounterMode(display=False) as counter:
                    step.run(number)
                flops[trained, number] = counter.get_total_flops()
                if trained == "all":
                    continue
                error = (model.render_first_frame if batch.ndim == 4 else model.render)(vectors) - batch
                error.square().mean().backward()
                for name, weight in step.model.named_parameters():
                    wanted = model.get_parameter(name).grad
                    if name.startswith(("decoder.", "post_quant_conv.")):
                        torch.testing.assert_close(weight.grad, wanted, rtol=1e-4, atol=1e-6)
                    else:
                        assert weight.grad is None and wanted is None, name
    for number in (1, 2):
        # Measured: 0.75, what the decoder's three passes and the encoder's one are of three of each.
        assert flops["decoder", number] < 0.8 * flops["all", number]


@pytest.mark.parametrize(
    ("changed", "refusal"),
    [
        ({"checkpoint__init_from": "null"}, r"checkpoint.init_from = None: train.trained decoder needs"),
        ({"codebook__update": "ema"}, r"codebook.update = 'ema': moves the codes"),
        ({"codebook__kmeans_batches": 2}, r"codebook.kmeans_batches = 2: with train.trained decoder the codes stay"),
        ({"codebook__start_step": 3}, r"codebook.start_step = 3: with train.trained decoder"),
        ({"codebook__restart_until_step": 9}, r"codebook.restart_until_step = 9: with"),
        ({"loss__codebook": 1}, r"loss.codebook = 1.0: with train.trained decoder the codes stay as they are, set 0"),
        ({"loss__commitment": 0.25}, r"loss.commitment = 0.25: with"),
        (
            {"loss__entropy": 0.1, "model__quantizer": "ibq", "train__accumulation_steps": 1},
            r"loss.entropy = 0.1: with",
        ),
        ({"loss__index_propagation": 1, "model__quantizer": "ibq"}, r"loss.index_propagation = 1.0: with"),
    ],
)
def test_what_would_move_the_codes_or_nothing_is_refused(released, tmp_path, changed, refusal):
    with pytest.raises(InputError, match=refusal):
        load(VisionTokenizerTrainingConfig, arguments(released, tmp_path, **changed))


def test_recipe_has_the_papers_terms_that_reach_the_decoder():
    config = load(VisionTokenizerTrainingConfig, [f"--config={EXAMPLE}"])
    emu3 = load(VisionTokenizerTrainingConfig, [f"--config={ROOT / 'examples/movqgan_emu3.yaml'}"])
    assert config.model == emu3.model == VisionTokenizerConfig()
    terms = ("l1", "l2", "gradient", "lpips_vgg16", "efficientnet_lite0", "adversarial", "adversarial_scale")
    assert all(getattr(config.loss, name) == getattr(emu3.loss, name) for name in terms)
    assert config.optim.weight_decay == 0 and config.optim.lr < emu3.optim.lr

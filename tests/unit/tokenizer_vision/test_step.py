"""One step against plain torch: the tokenizer's and the discriminator's updates, accumulation, starts, weights."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.config import load
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.runtime import Topology
from tests.support.double_precision import double_precision
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig
from tokenizer_train.vision.optimizer import NetworkOptimizer
from tokenizer_train.vision.parallel import Replicas
from tokenizer_train.vision.start import initial_tokenizer
from tokenizer_train.vision.step import TrainStep

EXAMPLE = Path(__file__).parents[3] / "examples/movqgan_tiny_cpu.yaml"
SETTINGS = {
    "model.codebook_size": 16,
    "model.ch_mult": "[1,1]",
    "model.attn_resolutions": "[]",
    "codebook.start_step": 0,
    "codebook.kmeans_batches": 0,
    "codebook.restart_interval": 0,
    "optim.lr_warmup_steps": 0,
    "train.train_steps": 20,
    "train.precision": "fp32",
    "train.init": "emu3",
    "train.freeze_batch_norm_step": 0,
    "loss.adversarial": 0.3,
    "discriminator.width": 8,
    "discriminator.num_layers": 2,
    "discriminator.optim.clip_grad": 0,
}


class GivenMedia:
    """Pictures, and in even steps clips, that depend on the sample alone and not on how a step is divided."""

    def __init__(self, samples: int, batches: int = 1, kinds: str = "pc") -> None:
        self.samples, self.batches, self.kinds = samples, batches, kinds

    def batch(self, step: int, accumulation_index: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        shape = (3, 16, 16) if self.kinds[(step - 1) % len(self.kinds)] == "p" else (4, 3, 16, 16)
        whole = torch.rand(self.samples * self.batches, *shape, generator=generator) * 2 - 1
        return whole.split(self.samples)[accumulation_index]


@pytest.fixture(scope="module")
def topology():
    with Topology.alone(RuntimeConfig(device="cpu", num_threads=1)) as alone:
        yield alone


@pytest.fixture
def make(topology):
    def made(media: GivenMedia, **options: object) -> TrainStep:
        given = SETTINGS | {name.replace("__", "."): value for name, value in options.items()}
        arguments = [f"--config={EXAMPLE}", *(f"--{name}={value}" for name, value in given.items())]
        config = load(VisionTokenizerTrainingConfig, arguments)
        model = initial_tokenizer(config).model.train()
        optimizer = NetworkOptimizer(model, config.optim, config.train.train_steps)
        return TrainStep(config, model, optimizer, media, Replicas(topology))

    return made


def by_hand(step: TrainStep, batch: torch.Tensor, scale: str = "fixed") -> tuple[dict, dict]:
    """Gradients of the tokenizer and of the discriminator, each from one plain loss with one backward pass."""
    weights = step.config.loss
    model, judge = copy.deepcopy(step.model), copy.deepcopy(step.adversary.network)
    latents = model.latents(batch)
    codes = model.quantize.assign(latents)
    vectors = model.quantize.lookup(codes)
    render = model.render_first_frame if batch.ndim == 4 else model.render
    drawn = render(latents + (vectors - latents).detach())
    error = drawn - batch
    rows, columns = error[..., 1:, :] - error[..., :-1, :], error[..., 1:] - error[..., :-1]
    reconstruction = weights.l1 * error.abs().mean() + weights.l2 * error.pow(2).mean()
    reconstruction = reconstruction + weights.gradient * (rows.abs().mean() + columns.abs().mean())
    adversarial, weight = -judge(drawn).mean(), weights.adversarial
    if scale == "adaptive":
        kernel = model.decoder.conv_out.weight
        norms = [
            torch.autograd.grad(term, kernel, retain_graph=True)[0].norm() for term in (reconstruction, adversarial)
        ]
        weight = weight * (norms[0] / (norms[1] + 1e-4)).item()
    loss = reconstruction + weight * adversarial
    loss = loss + weights.codebook * (vectors - latents.detach()).pow(2).mean()
    loss = loss + weights.commitment * (latents - vectors.detach()).pow(2).mean()
    loss.backward()
    judge = copy.deepcopy(step.adversary.network)
    (0.5 * (F.relu(1 - judge(batch)).mean() + F.relu(1 + judge(drawn.detach())).mean())).backward()
    found = {"loss": loss.item(), "adversarial": adversarial.item(), "weight": weight}
    return found, {"model": gradients(model), "judge": gradients(judge)}


def gradients(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in network.named_parameters() if weight.grad is not None}


def compare(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    """Relative to each tensor's largest gradient, or to a hundredth of the network's: a bias before a norm has none."""
    assert found.keys() == wanted.keys()
    least = 0.01 * max(value.abs().max() for value in wanted.values())
    for name, value in wanted.items():
        error = (found[name] - value).abs().max() / value.abs().max().clamp(min=least)
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("kind", ["p", "c"])
@pytest.mark.parametrize("scale", ["fixed", "adaptive"])
def test_a_step_is_that_of_one_plain_loss(make, kind, scale):
    media = GivenMedia(2, kinds=kind)
    step = make(media, loss__adversarial_scale=scale, optim__clip_grad=0)
    numbers, wanted = by_hand(step, media.batch(1), scale)
    before = copy.deepcopy(step.adversary.network.state_dict())
    line = step.run(1)
    # The order of the sums differs; measured: 1.3e-5 of a tensor's largest gradient.
    compare(gradients(step.model), wanted["model"], 1e-4)
    compare(gradients(step.adversary.network), wanted["judge"], 1e-4)
    assert line["loss"] == pytest.approx(numbers["loss"], rel=1e-5)
    assert line["loss_adversarial"] == pytest.approx(numbers["adversarial"], rel=1e-4, abs=1e-6)
    assert line["weight_adversarial"] == pytest.approx(numbers["weight"], rel=1e-4)
    assert {f"weight_{name[5:]}" for name in line if name.startswith("loss_")} - set(line) == {"weight_discriminator"}
    used, other = ("pictures", "clips") if kind == "p" else ("clips", "pictures")
    for name, tensor in step.adversary.network.state_dict().items():
        moved = not torch.equal(tensor, before[name])
        assert not (moved and name.startswith(other)), "the network of the other kind is left alone"
        if name.startswith(used) and name.endswith("weight"):
            assert moved


def test_accumulation_is_the_whole_batch(make):
    """With norms that do not look at several samples at once; with batch norms it is another function."""
    results = []
    for samples, batches in ((4, 1), (2, 2)):
        options = {"train__accumulation_steps": batches, "discriminator__norm": "group", "optim__clip_grad": 0}
        with double_precision():
            step = make(GivenMedia(samples, batches), train__freeze_batch_norm_step=1, **options)
            step.model.eval()
            lines = [step.run(1), step.run(2)]
        results.append((lines, gradients(step.model), gradients(step.adversary.network)))
    (whole, *networks), (parts, *others) = results
    for mine, expected in zip(parts, whole, strict=True):
        assert mine == pytest.approx(expected, rel=1e-9)
    for mine, expected in zip(others, networks, strict=True):
        compare(mine, expected, 1e-9)


def test_codes_are_placed_with_the_norms_of_the_steps_that_follow(make):
    """Latents of batch statistics and latents of running ones lie in different places."""
    options = {"codebook__start_step": 1, "codebook__kmeans_batches": 2, "train__freeze_batch_norm_step": 2}
    step = make(GivenMedia(4), **options)
    step.run(1)
    norms = [module for module in step.model.modules() if isinstance(module, torch.nn.BatchNorm3d)]
    before = [norm.running_mean.clone() for norm in norms]
    assert norms and all(norm.training for norm in norms)
    step.run(2)
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))


def test_starts_are_the_configured_ones(make):
    step = make(GivenMedia(2, kinds="p"), discriminator__start_step=1, loss__adversarial_start_step=2)
    lines = [step.run(number) for number in (1, 2, 3)]
    assert ["loss_discriminator" in line for line in lines] == [False, True, True]
    assert ["loss_adversarial" in line for line in lines] == [False, False, True]
    assert [line.get("weight_adversarial") for line in lines[:2]] == [None, None]
    assert lines[2]["weight_adversarial"] == pytest.approx(0.3)
    # A cosine over 19 steps of its own: 0.993 of the peak in the first, where the run's second of 20 has 0.976.
    assert lines[1]["discriminator_learning_rate"] == pytest.approx(0.993e-4, rel=1e-3)


def test_the_adversary_leaves_its_weights_to_its_own_step(make):
    step = make(GivenMedia(2, kinds="p"))
    drawn = torch.rand(2, 3, 16, 16, requires_grad=True)
    step.adversary.scores(drawn).mean().backward()
    assert drawn.grad.abs().sum() > 0 and not gradients(step.adversary.network)
    assert all(weight.requires_grad for weight in step.adversary.network.parameters())


def test_a_redrawn_batch_is_what_the_updated_tokenizer_draws(make):
    lines = {}
    for redraw in (False, True):
        step = make(GivenMedia(2, kinds="p"), discriminator__redraw=redraw, optim__lr=0.01)
        batch, judge = step.media.batch(1), copy.deepcopy(step.adversary.network)
        lines[redraw] = step.run(1)
        with torch.no_grad():
            drawn = step._drawing(batch, quantize=True).pixels
            score = judge(drawn).mean().item()
        assert (lines[redraw]["score_drawn"] == pytest.approx(score, rel=1e-3)) == redraw


def test_a_discriminator_learns_what_is_drawn(make):
    """Against a tokenizer that stands still, it tells real from drawn."""
    step = make(GivenMedia(4, kinds="p"), optim__lr=0, optim__min_lr=0, discriminator__optim__lr=2e-3)
    step.model.eval()
    first, *_, last = (step.run(number) for number in range(1, 20))
    assert first["loss_discriminator"] == pytest.approx(1.0, abs=0.3)
    assert last["loss_discriminator"] < 0.3 and last["score_real"] > last["score_drawn"] + 1  # measured: 0.005


def test_the_perceptual_term_acts_with_its_weight_from_its_step(make):
    steps = {
        weight: make(
            GivenMedia(2, kinds="p"),
            loss__adversarial=0,
            loss__efficientnet_lite0=weight,
            loss__perceptual_start_step=1,
            optim__lr=0,
            optim__min_lr=0,
        )
        for weight in (0, 0.5, 1.0)
    }
    assert all("loss_efficientnet_lite0" not in step.run(1) for step in steps.values())
    lines = {weight: step.run(2) for weight, step in steps.items()}
    assert "loss_efficientnet_lite0" not in lines[0]
    term = lines[1.0]["loss_efficientnet_lite0"]
    assert term > 0.1 and lines[0.5]["loss_efficientnet_lite0"] == pytest.approx(term)
    for weight in (0.5, 1.0):
        assert lines[weight]["weight_efficientnet_lite0"] == weight
        assert lines[weight]["loss"] == pytest.approx(lines[0]["loss"] + weight * term, rel=1e-4)


def test_the_discriminators_state_is_all_that_a_resume_needs(make):
    whole = make(GivenMedia(2))
    for number in (1, 2):
        whole.run(number)
    saved = copy.deepcopy([part.state_dict() for part in (whole.model, whole.optimizer, whole)])
    expected = [whole.run(number) for number in (3, 4)]
    resumed = make(GivenMedia(2), train__seed=1234)
    for part, state in zip((resumed.model, resumed.optimizer, resumed), saved, strict=True):
        part.load_state_dict(state)
    assert [resumed.run(number) for number in (3, 4)] == expected

"""Configuration of a vision tokenizer's training."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_ext.config import InputError
from megatron_ext.config.checkpoint import SaveConfig
from megatron_ext.config.observe import ObserveConfig
from megatron_ext.config.optim import OptimConfig
from megatron_ext.config.runtime import DeviceName
from megatron_ext.config.section import Count, Decay, Name, NonNegative, Number, Positive, Section, Seed, above
from megatron_ext.vision import VisionTokenizerConfig
from tokenizer_train.vision.config_media import MediaConfig


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section, section="loss"):
    """Weights of the terms of the loss; each term is a mean over all its numbers, and its weight here is the one that
    acts. Terms of weight 0 other than those of the pixels are not computed."""

    l1: NonNegative = 1.0
    """Absolute difference of the pixels."""

    l2: NonNegative = 1.0
    """Squared difference of the pixels."""

    gradient: NonNegative = 0.5
    """Absolute difference of the pixels' differences to their right and lower neighbours: keeps edges."""

    lpips_vgg16: NonNegative = 0.0
    """LPIPS (version 0.1, VGG16): squared distance of features, weighted as people judged."""

    efficientnet_lite0: NonNegative = 0.0
    """Squared distance of the features of EfficientNet-Lite0, which needs no file: LPIPS's formula without its learned
    heads, not LPIPS. It orders distortions as LPIPS does (rank correlation 0.97) with numbers about 1.8 times as large.
    """

    perceptual_start_step: Number = 0
    """Steps before lpips_vgg16 and efficientnet_lite0 act."""

    vgg16_weights: Name | None = None
    """File of VGG16 weights in torchvision's format (vgg16-397923af.pth); tokenizer_train.vision.fetch_vgg16 fetches
    its convolutions."""

    lpips_heads: Name | None = None
    """File of LPIPS's heads in the format of the lpips package (weights/v0.1/vgg.pth); fetched likewise."""

    adversarial: NonNegative = 0.0
    """Minus the discriminator's mean score of what was drawn (hinge GAN)."""

    adversarial_start_step: Number = 0
    """Steps before adversarial acts; the discriminator may learn from an earlier step on."""

    adversarial_scale: Literal["fixed", "adaptive"] = "fixed"
    """What the weight of adversarial is multiplied with: 1, or the length of the reconstruction's gradient over that of
    the adversarial one at the decoder's last kernel (VQGAN, Esser et al. 2021), of each micro-batch over all ranks."""

    codebook: NonNegative = 1.0
    """Squared distance that moves the codes to the latents."""

    commitment: NonNegative = 0.25
    """Squared distance that moves the latents to their codes."""

    index_propagation: NonNegative = 0.0
    """Squared distance of latents and codes through the softmax over all codes; model.quantizer ibq alone (Emu3.5: 1,
    with commitment 1 and codebook 0.25)."""

    entropy: NonNegative = 0.0
    """Mean entropy of the softmax over all codes minus the entropy of its mean: sure choices, evenly used codes;
    model.quantizer ibq alone (Emu3.5's weight is unpublished)."""

    entropy_temperature: Positive = 0.01
    """What the scores are divided by before that softmax (Emu3.5: 0.01)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lpips_vgg16 and not (self.vgg16_weights and self.lpips_heads):
            raise InputError(
                f"loss.lpips_vgg16 = {self.lpips_vgg16}: needs loss.vgg16_weights and loss.lpips_heads; "
                "python -m tokenizer_train.vision.fetch_vgg16 fetches both, loss.efficientnet_lite0 needs neither"
            )


@dataclass(frozen=True, kw_only=True)
class CodebookConfig(Section, section="codebook"):
    """What keeps the codebook from collapsing."""

    update: Literal["gradient", "ema"] = "gradient"
    """What moves the codes: the optimizer by loss.codebook, or moving averages of the latents that choose them (van den
    Oord et al. 2017), for which loss.codebook must be 0."""

    ema_decay: Annotated[Decay, above(0)] = 0.99
    """Share that a step keeps of a code's average and of its averaged number of latents, which is logged either way
    as codes_perplexity_average."""

    start_step: Number = 0
    """Steps without quantisation, as a plain autoencoder, at the beginning; then k-means places the codes."""

    kmeans_batches: Number = 50
    """Batches whose latents k-means groups; 0 leaves the codes where they were initialised, which collapses from
    scratch and is for trained weights."""

    kmeans_iterations: Number = 15
    """Rounds of k-means; 0 leaves the codes on the latents that were drawn for a start."""

    restart_interval: Number = 20
    """Codes that no latent chose in so many steps are moved onto random latents; 0 never."""

    restart_until_step: Number = 0
    """Last step with restarts; late ones only add noise."""


@dataclass(frozen=True, kw_only=True)
class VisionTrainConfig(Section, section="train"):
    """Length, seed and precision of the training."""

    train_steps: Count = 1000
    """Optimizer steps."""

    trained: Literal["all", "decoder"] = "all"
    """What learns: all, or the decoder alone, so that checkpoint.init_from's encoder and codes stay to the last bit and
    what was tokenized with them stays valid."""

    accumulation_steps: Count = 1
    """Batches of media.batch_size (over all ranks) that a step sees, one after the other. Batch norms normalise over
    one of them at a time: two batches of 4 are not one of 8 to them, unless they are frozen."""

    seed: Seed = 1234
    """Seed of initial weights, order of the media, crops, k-means and restarts."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type in which the networks compute; weights, quantiser and losses stay fp32. auto is what the run began with, for
    a new run bf16 on a GPU and on a CPU that multiplies it, else fp32."""

    ema_decay: Decay = 0.0
    """Share of the averaged weights that a step keeps (SBER's MoVQGAN: 0.9999); the average is evaluated and released.
    0 releases the last weights."""

    recompute_min_side: Number = 0
    """Frames of at least so many pixels squared keep only the inputs of the networks' blocks, whose insides are
    computed again in the backward pass: a third more work for a fraction of the memory, for 512 and more; 0 never."""

    compile: bool = False
    """Let torch.compile fuse the 2D networks; the first batch of each size then takes minutes. On a CPU with precision
    fp32 only."""

    device: DeviceName = "auto"
    """Where to compute; auto takes a GPU where one is visible."""

    deterministic: bool = False
    """Ask for bitwise repeatable kernels, and fail where there is none. A CPU is repeatable anyway."""

    distributed_timeout_s: Count = 600
    """Seconds that ranks wait for each other, as at evaluations, which rank 0 does alone, before the run ends."""

    exit_interval: Count | None = None
    """Save and stop after a step divisible by this; the next start of the same run goes on."""

    exit_duration: NonNegative | None = None
    """Minutes after the start at which to save and stop; the next start of the same run goes on."""

    init: Literal["near_identity", "emu3"] = "near_identity"
    """Initial weights: residual branches at zero and temporal layers that pass frames on, or those of Emu3's code."""

    freeze_batch_norm_step: Number = 0
    """First step in which the batch norms use their running statistics, as in use; 0 never."""

    eval_interval: Number = 500
    """Steps between evaluations, on media.valid_inputs; one more at the end, which 0 leaves alone."""

    eval_samples: Number = 64
    """Pictures, and clips, evaluated at most: the first ones."""

    eval_clip_frames: Number = 16
    """Frames of a clip evaluated at most, from its start: whole chunks of temporal_downsample_factor, at least one."""

    num_threads: Number = 0
    """CPU threads per rank; 0 shares the cores that this process may use evenly among the machine's ranks."""


@dataclass(frozen=True, kw_only=True)
class VisionOptimConfig(OptimConfig):
    """Optimizer, clipping and the learning-rate schedule."""

    optimizer: Literal["adam", "muon"] = "adam"
    """What steps the kernels between hidden layers: AdamW as all else, or Muon (Jordan et al. 2024), scaled to AdamW's
    learning rates and weight decays (Liu et al. 2025), which needs fewer steps and half the moments."""

    clip_grad_value: NonNegative = 0.0
    """Largest absolute value of a gradient's numbers (SBER's MoVQGAN: 1.0), after clip_grad; 0 turns it off."""


def _discriminator_optim() -> VisionOptimConfig:
    return VisionOptimConfig(lr=1e-4, adam_beta1=0.5, adam_beta2=0.9, weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig(Section, section="discriminator"):
    """The PatchGANs of pictures and of clips, which are there where loss.adversarial is not 0."""

    start_step: Number = 0
    """Steps before the discriminator learns; not after loss.adversarial_start_step."""

    width: Count = 64
    """Channels of its first layer; every further layer has twice as many, up to 8 times."""

    num_layers: Count = 3
    """Layers that halve the grid. A score sees 34 pixels a side with 2 of them, 70 with 3."""

    norm: Literal["batch", "group"] = "batch"
    """Norms between its layers: over the batch of all ranks, as published PatchGANs have, or within each picture, which
    gradient accumulation and small batches do not change."""

    redraw: bool = False
    """Let the discriminator learn from what the tokenizer draws after its own step of the same batch, as a trainer with
    two optimizers in turn does (Lightning 1), at the price of another forward pass; else from what it drew before."""

    optim: VisionOptimConfig = field(default_factory=_discriminator_optim)
    """AdamW, clipping and the learning-rate schedule, which counts the discriminator's own steps. Rate and decays of
    the moments are by default those of SBER's MoVQGAN."""


@dataclass(frozen=True, kw_only=True)
class VisionCheckpointConfig(SaveConfig):
    """When to save, what to keep, where weights come from."""

    init_from: Name | None = None
    """Folder of a vision tokenizer (a checkpoint of another run is one too), or file of a 2D MoVQGAN in SBER's layout,
    whose weights start a new run; ignored once the run has a checkpoint."""


CODE_TERMS = ("codebook", "commitment", "index_propagation", "entropy")
"""Weights of section loss that act on encoder and codes alone."""

CODE_STEPS = ("start_step", "kmeans_batches", "restart_until_step")
"""Fields of section codebook that say until when codes are absent or moved."""


@dataclass(frozen=True, kw_only=True)
class VisionTokenizerTrainingConfig(Section):
    """Train a vision tokenizer on pictures and clips."""

    media: MediaConfig
    """Which pictures and clips are seen."""

    observe: ObserveConfig
    """The run folder."""

    model: VisionTokenizerConfig = field(default_factory=VisionTokenizerConfig)
    """Shape of the tokenizer."""

    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the loss."""

    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The networks of the adversarial loss and their optimizer."""

    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    """What keeps the codebook from collapsing."""

    optim: VisionOptimConfig = field(default_factory=VisionOptimConfig)
    """AdamW, clipping and the learning-rate schedule."""

    train: VisionTrainConfig = field(default_factory=VisionTrainConfig)
    """Length, seed and precision."""

    checkpoint: VisionCheckpointConfig = field(default_factory=VisionCheckpointConfig)
    """When to save, what to keep, where weights come from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_quantizer()
        if self.train.trained == "decoder":
            self._check_codes_stay()
        self.media.check_factors(self.model.spatial_factor, self.model.temporal_downsample_factor)
        if self.loss.adversarial and not (
            self.discriminator.start_step <= self.loss.adversarial_start_step < self.train.train_steps
        ):
            raise InputError(
                f"loss.adversarial_start_step = {self.loss.adversarial_start_step}: must be at least "
                f"discriminator.start_step = {self.discriminator.start_step} and below train.train_steps = "
                f"{self.train.train_steps}"
            )
        if self.codebook.start_step >= self.train.train_steps:
            raise InputError(
                f"codebook.start_step = {self.codebook.start_step}: must be below train.train_steps = "
                f"{self.train.train_steps}, or the codes are never placed"
            )

    def _check_codes_stay(self) -> None:
        """Refuse what would move the codes, or nothing at all."""
        if self.checkpoint.init_from is None:
            raise InputError(
                "checkpoint.init_from = None: train.trained decoder needs the folder of a trained tokenizer"
            )
        loss, codebook = self.loss, self.codebook
        if codebook.update == "ema":
            raise InputError("codebook.update = 'ema': moves the codes, set gradient with train.trained decoder")
        idle = {f"loss.{name}": getattr(loss, name) for name in CODE_TERMS}
        idle |= {f"codebook.{name}": getattr(codebook, name) for name in CODE_STEPS}
        for name, value in idle.items():
            if value:
                raise InputError(f"{name} = {value}: with train.trained decoder the codes stay as they are, set 0")

    def _check_quantizer(self) -> None:
        loss, codebook = self.loss, self.codebook
        if self.model.quantizer == "ibq":
            wrong = {
                "update": codebook.update != "gradient",
                "kmeans_batches": codebook.kmeans_batches > 0,
                "restart_until_step": codebook.restart_until_step > 0,
            }
            for name in (name for name, is_wrong in wrong.items() if is_wrong):
                raise InputError(
                    f"codebook.{name} = {getattr(codebook, name)!r}: is for model.quantizer nearest; every code of an "
                    f"ibq has a gradient, so set {'gradient' if name == 'update' else 0}"
                )
            if loss.entropy and self.train.accumulation_steps > 1:
                raise InputError(
                    f"loss.entropy = {loss.entropy} with train.accumulation_steps = {self.train.accumulation_steps}: "
                    "set 1, and take more ranks instead; the entropy of a mean is not the mean of entropies"
                )
            return
        for name in ("index_propagation", "entropy"):
            if getattr(loss, name):
                raise InputError(f"loss.{name} = {getattr(loss, name)}: acts with model.quantizer ibq alone, set 0")
        if codebook.update == "ema" and loss.codebook:
            raise InputError(f"loss.codebook = {loss.codebook}: moves nothing with codebook.update ema, set 0")

"""One step of a vision tokenizer's training: the tokenizer's, then the discriminator's.

Both go through the micro-batches of the step and add up gradients; every loss is a mean over equal parts, so that the
step is that of the whole batch (batch norms apart, which see a micro-batch at a time).

Shapes: B batch, T frames, C colour channels, H W pixels; D codebook vector size, t latent frames, h w code grid,
N vectors, K codes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ext.runtime.device import autocast
from megatron_ext.vision import MoVQGAN
from tokenizer_train.vision.adversary import Adversary
from tokenizer_train.vision.codebook import CodebookKeeper
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig
from tokenizer_train.vision.data import TrainingMedia
from tokenizer_train.vision.decoder_alone import hold_statistics
from tokenizer_train.vision.losses import (
    adaptive_weight,
    adversarial_loss,
    pixel_terms,
    weighted_sum,
    weights_at,
)
from tokenizer_train.vision.optimizer import NetworkOptimizer
from tokenizer_train.vision.parallel import Replicas
from tokenizer_train.vision.perceptual import perceptual_distances
from tokenizer_train.vision.quantize_loss import quantize_latents, quantizer_terms


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What the tokenizer makes of a batch."""

    pixels: Tensor
    """Float32, shaped as the batch."""

    quantizer_terms: dict[str, Tensor]
    """Terms of the loss between latents and codes; empty while there is no quantisation."""

    latents_BDthw: Tensor
    """What the encoder says, without a graph."""

    codes_Bthw: Tensor | None
    """The codes, where quantisation has begun."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What is left of one micro-batch after its backward pass."""

    batch: Tensor
    """The pixels wanted."""

    drawn: Tensor
    """The pixels drawn, without a graph."""

    metrics: dict[str, Tensor]
    """The loss, its terms unweighted, and the weights that acted."""

    latents_BDthw: Tensor
    codes_Bthw: Tensor | None


class TrainStep:
    """What one step needs: the tokenizer, its optimizer, the media, its adversary if it has one, and the keeper of its
    codebook."""

    def __init__(
        self,
        config: VisionTokenizerTrainingConfig,
        model: MoVQGAN,
        optimizer: NetworkOptimizer,
        media: TrainingMedia,
        replicas: Replicas,
    ) -> None:
        """Raises InputError where a perceptual network's weights are missing."""
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.media = media
        self.replicas = replicas
        self.device = next(model.parameters()).device
        self.codebook = CodebookKeeper(config.codebook, model.quantize, config.train.seed, replicas)
        self.distances = {name: net.to(self.device) for name, net in perceptual_distances(config.loss).items()}
        self.adversary = Adversary(config, self.device, replicas) if config.loss.adversarial else None
        replicas.join_batch_norms(model)
        # Until the codes are placed, they have no gradient.
        self._draw = replicas.call(model, self._drawing, may_skip=True)

    def run(self, step: int) -> dict[str, Any]:
        """Optimizer step number `step` (the first is 1); the metrics line without timing."""
        codebook = self.config.codebook
        if 0 < self.config.train.freeze_batch_norm_step <= step:
            self._freeze_batch_norm()
        if step == codebook.start_step + 1 and codebook.kmeans_batches:
            self._place_codes(step)
        self.optimizer.zero_grad()
        passes = [self._pass(step, index) for index in range(self.config.train.accumulation_steps)]
        values = torch.stack([torch.stack(list(done.metrics.values())) for done in passes])
        means = self.replicas.mean(values.mean(0)).tolist()
        line = {"step": step} | dict(zip(passes[0].metrics, means, strict=True)) | self.optimizer.step(step)
        line["num_samples"] = sum(done.latents_BDthw.shape[0] for done in passes) * self.replicas.count
        line["num_tokens"] = sum(done.latents_BDthw[:, 0].numel() for done in passes) * self.replicas.count
        if self.adversary is not None and self.adversary.learns_at(step):
            line |= self.adversary.learn(step, [(done.batch, self._drawn_for_adversary(step, done)) for done in passes])
        return line | (self._note_codes(step, passes) if passes[0].codes_Bthw is not None else {})

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs beside the weights and moments of the tokenizer."""
        return {"codebook": self.codebook.state_dict()} | (
            {"adversary": self.adversary.state_dict()} if self.adversary else {}
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.codebook.load_state_dict(state["codebook"])
        if self.adversary:
            self.adversary.load_state_dict(state["adversary"])

    def _pass(self, step: int, index: int) -> Pass:
        """Forward and backward of micro-batch `index`."""
        count = self.config.train.accumulation_steps
        batch = self.media.batch(step, index).to(self.device)
        with self.replicas.exchanging(self._draw, now=index == count - 1):
            drawing = self._draw(batch, quantize=step > self.config.codebook.start_step)
            terms, weights, gradient = self._wanted(drawing.pixels, batch, weights_at(self.config.loss, step))
            terms |= drawing.quantizer_terms
            # Through the networks of the losses to the pixels the gradient has come already.
            tensors, gradients = [drawing.pixels], [gradient / count]
            if drawing.quantizer_terms:
                tensors.append(weighted_sum(drawing.quantizer_terms, weights) / count)
                gradients.append(None)
            torch.autograd.backward(tensors, gradients)
        metrics = {"loss": weighted_sum(terms, weights)} | {f"loss_{name}": term for name, term in terms.items()}
        metrics |= {f"weight_{name}": torch.as_tensor(weights[name], device=self.device) for name in terms}
        return Pass(
            batch=batch,
            drawn=drawing.pixels.detach(),
            metrics={name: value.detach() for name, value in metrics.items()},
            latents_BDthw=drawing.latents_BDthw,
            codes_Bthw=drawing.codes_Bthw,
        )

    def _drawing(self, batch: Tensor, *, quantize: bool) -> Drawing:
        """Encoded, quantised where `quantize`, and drawn again; a picture's first frame only."""
        model = self.model
        if self.config.train.trained == "decoder":
            return self._drawing_from_given_codes(batch)
        with self._autocast():
            latents_BDthw = model.latents(batch)
        latents_BDthw = latents_BDthw.float()
        terms, codes_Bthw, drawn_from_BDthw = {}, None, latents_BDthw
        if quantize:
            loss = self.config.loss
            quantized = quantize_latents(model.quantize, latents_BDthw)
            codes_Bthw, drawn_from_BDthw = quantized.codes_BTHW, quantized.passed_through_BDTHW
            terms = quantizer_terms(
                quantized,
                entropy_temperature=loss.entropy_temperature if loss.entropy else None,
                mean_over_ranks=self.replicas.mean,
            )
        return Drawing(
            pixels=self._rendered(batch, drawn_from_BDthw),
            quantizer_terms=terms,
            latents_BDthw=latents_BDthw.detach(),
            codes_Bthw=codes_Bthw,
        )

    def _drawing_from_given_codes(self, batch: Tensor) -> Drawing:
        """The same where the decoder alone is trained: without a graph up to the codes."""
        with torch.no_grad():
            hold_statistics(self.model)
            with self._autocast():
                latents_BDthw = self.model.latents(batch)
            codes_Bthw = self.model.quantize.assign(latents_BDthw)
            vectors_BDthw = self.model.quantize.lookup(codes_Bthw)
        pixels = self._rendered(batch, vectors_BDthw)
        return Drawing(pixels=pixels, quantizer_terms={}, latents_BDthw=latents_BDthw.float(), codes_Bthw=codes_Bthw)

    def _rendered(self, batch: Tensor, vectors_BDthw: Tensor) -> Tensor:
        """Float32 pixels, shaped as `batch`, that the decoder draws from vectors."""
        render = self.model.render_first_frame if batch.ndim == 4 else self.model.render
        with self._autocast():
            return render(vectors_BDthw).float()

    def _wanted(
        self, pixels: Tensor, batch: Tensor, weights: dict[str, float]
    ) -> tuple[dict[str, Tensor], dict[str, float | Tensor], Tensor]:
        """The terms that judge pixels, all weights as they act, and the gradient of the weighted sum at `pixels`."""
        leaf = pixels.detach().requires_grad_()
        terms = pixel_terms(leaf, batch)
        terms |= {name: net(leaf, batch).mean() for name, net in self.distances.items() if weights[name]}
        reconstruction = weighted_sum(terms, weights)
        if not weights["adversarial"]:
            (gradient,) = torch.autograd.grad(reconstruction, leaf)
            return terms, weights, gradient
        terms["adversarial"] = adversarial_loss(self.adversary.scores(leaf))
        (gradient,) = torch.autograd.grad(reconstruction, leaf)
        (adversarial_gradient,) = torch.autograd.grad(terms["adversarial"], leaf)
        if self.config.loss.adversarial_scale == "adaptive":
            scale = self._adaptive_scale(pixels, gradient, adversarial_gradient)
            weights = weights | {"adversarial": weights["adversarial"] * scale}
        return terms, weights, gradient + weights["adversarial"] * adversarial_gradient

    def _adaptive_scale(self, pixels: Tensor, *gradients: Tensor) -> Tensor:
        """Lengths of the gradients of reconstruction and adversary at the decoder's last kernel, of all ranks."""
        kernel = self.model.decoder.conv_out.weight
        found = [torch.autograd.grad(pixels, kernel, gradient, retain_graph=True)[0] for gradient in gradients]
        return adaptive_weight(*(self.replicas.mean(gradient) for gradient in found))

    @torch.no_grad()
    def _drawn_for_adversary(self, step: int, done: Pass) -> Tensor:
        if not self.config.discriminator.redraw:
            return done.drawn
        return self._drawing(done.batch, quantize=step > self.config.codebook.start_step).pixels

    def _note_codes(self, step: int, passes: list[Pass]) -> dict[str, float]:
        """Let the keeper of the codes see what the step chose; metrics."""
        latents = [_rows(done.latents_BDthw) for done in passes]
        return self.codebook.note(step, [done.codes_Bthw for done in passes], latents, self.optimizer.adam)

    @torch.no_grad()
    def _place_codes(self, step: int) -> None:
        """K-means over the latents of the coming batches."""
        latents = []
        for ahead in range(self.config.codebook.kmeans_batches):
            for index in range(self.config.train.accumulation_steps):
                with self._autocast():
                    latents_BDthw = self.model.latents(self.media.batch(step + ahead, index).to(self.device))
                latents.append(_rows(latents_BDthw.float()))
        self.codebook.place(latents)

    def _freeze_batch_norm(self) -> None:
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.eval()

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self.config.train.precision)


def _rows(latents_BDthw: Tensor) -> Tensor:
    """Latents as rows [N, D]."""
    return latents_BDthw.movedim(1, -1).flatten(0, -2)

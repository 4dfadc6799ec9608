"""One optimizer step of a vision tokenizer's training.

Shapes: B batch, T frames, C colour channels, H W pixels; D codebook vector size, t latent frames, h w code grid,
N vectors, K codes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megatron_ext.optim.schedule import learning_rate
from megatron_ext.vision import MoVQGAN
from tokenizer_train.vision.codebook import kmeans, perplexity, restart_dead_codes
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig
from tokenizer_train.vision.data import TrainingMedia, torch_generator
from tokenizer_train.vision.losses import Quantized, tokenizer_loss


class TrainStep:
    """What one step needs: the model, its optimizer, the media, and which codes were used since the last restart."""

    def __init__(
        self,
        config: VisionTokenizerTrainingConfig,
        model: MoVQGAN,
        optimizer: torch.optim.Optimizer,
        media: TrainingMedia,
    ) -> None:
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.media = media
        self.device = next(model.parameters()).device
        self.used_K = torch.zeros(config.model.codebook_size, dtype=torch.bool, device=self.device)

    def run(self, step: int) -> dict[str, Any]:
        """Optimizer step number `step` (the first is 1); the metrics line without timing."""
        codebook, optim, total = self.config.codebook, self.config.optim, self.config.train.train_steps
        if step == codebook.start_step + 1 and codebook.kmeans_batches:
            self._place_codes(step)
        if 0 < self.config.train.freeze_batch_norm_step < step:
            self._freeze_batch_norm()
        rate = learning_rate(
            step,
            peak=optim.lr,
            minimum=optim.min_lr,
            warmup_steps=optim.lr_warmup_steps,
            decay_steps=optim.lr_decay_steps or total,
            style=optim.lr_decay_style,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        pixels = self.media.batch(step).to(self.device)
        loss, terms, quantized, latents_BDthw = self._forward(pixels, quantize=step > codebook.start_step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        largest = optim.clip_grad or float("inf")
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), largest, error_if_nonfinite=True)
        self.optimizer.step()
        line = {"step": step, "loss": loss, **{f"loss_{name}": term for name, term in terms.items()}}
        line = {name: value.item() if isinstance(value, Tensor) else value for name, value in line.items()}
        line |= {"grad_norm": grad_norm.item(), "learning_rate": rate}
        line["num_tokens"] = latents_BDthw[:, 0].numel()
        return line | (self._note_codes(step, quantized) if quantized else {})

    def _forward(self, pixels: Tensor, *, quantize: bool) -> tuple[Tensor, dict[str, Tensor], Quantized | None, Tensor]:
        """Loss, its terms, the quantised latents where quantisation has begun, and the latents."""
        model = self.model
        with self._autocast():
            latents_BDthw = model.latents(pixels)
        latents_BDthw = latents_BDthw.float()
        quantized, drawn_from_BDthw = None, latents_BDthw
        if quantize:
            codes_Bthw = model.quantize.nearest(latents_BDthw)
            vectors_BDthw = model.quantize.lookup(codes_Bthw)
            quantized = Quantized(latents_BDTHW=latents_BDthw, codes_BTHW=codes_Bthw, vectors_BDTHW=vectors_BDthw)
            drawn_from_BDthw = quantized.passed_through_BDTHW
        with self._autocast():
            render = model.render_first_frame if pixels.ndim == 4 else model.render
            drawn = render(drawn_from_BDthw)
        loss, terms = tokenizer_loss(drawn.float(), pixels, quantized, self.config.loss)
        return loss, terms, quantized, latents_BDthw

    def _note_codes(self, step: int, quantized: Quantized) -> dict[str, float]:
        """Keep count of the codes in use, restart dead ones when it is time; metrics."""
        codebook = self.config.codebook
        counts_K = torch.bincount(quantized.codes_BTHW.flatten(), minlength=self.config.model.codebook_size)
        self.used_K |= counts_K > 0
        line = {"codes_perplexity": perplexity(counts_K)}
        if codebook.restart_interval and step % codebook.restart_interval == 0:
            line["codes_used"] = int(self.used_K.sum())
            if step <= codebook.restart_until_step:
                latents_ND = quantized.latents_BDTHW.detach().movedim(1, -1).flatten(0, -2)
                generator = torch_generator(self.config.train.seed, "restart", step)
                line["codes_restarted"] = restart_dead_codes(
                    self.model.quantize.embedding, self.used_K, latents_ND, self.optimizer, generator
                )
            self.used_K.zero_()
        return line

    @torch.no_grad()
    def _place_codes(self, step: int) -> None:
        """K-means over the latents of the coming batches."""
        codebook = self.config.codebook
        latents = []
        for ahead in range(codebook.kmeans_batches):
            with self._autocast():
                latents_BDthw = self.model.latents(self.media.batch(step + ahead).to(self.device))
            latents.append(latents_BDthw.float().movedim(1, -1).flatten(0, -2))
        generator = torch_generator(self.config.train.seed, "kmeans")
        weight_KD = self.model.quantize.embedding.weight
        weight_KD.copy_(kmeans(torch.cat(latents), len(weight_KD), codebook.kmeans_iterations, generator))

    def _freeze_batch_norm(self) -> None:
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.eval()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")

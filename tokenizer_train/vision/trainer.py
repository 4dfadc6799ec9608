"""One training of a vision tokenizer: step, evaluation, checkpoint, resume.

Shapes: B batch, T frames, C colour channels, H W pixels; D codebook vector size, t latent frames, h w code grid,
N vectors, K codes.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ext.checkpoint.store import CheckpointStore, read_metadata
from megatron_ext.config import InputError, as_dict
from megatron_ext.observe import Run
from megatron_ext.optim.schedule import learning_rate
from megatron_ext.vision import MoVQGAN, load_vision_tokenizer
from tokenizer_train.vision import evaluate
from tokenizer_train.vision.codebook import kmeans, perplexity, restart_dead_codes
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig
from tokenizer_train.vision.data import TrainingMedia, torch_generator
from tokenizer_train.vision.initialize import near_identity
from tokenizer_train.vision.losses import Quantized, tokenizer_loss

SHAPING_SECTIONS = ("media", "model", "loss", "codebook", "optim", "train")
"""Sections that a resume must find as they were; observe and checkpoint may change."""

STATE_FILE = "state.pt"


class Trainer:
    """What a training holds: the model, the optimizer, the step, and which codes were used since the last restart."""

    def __init__(
        self, config: VisionTokenizerTrainingConfig, media: TrainingMedia, run: Run, device: torch.device
    ) -> None:
        self.config = config
        self.media = media
        self.run = run
        self.step = 0
        self.device = device
        self.model = self._initial_model().to(device).train()
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optim.lr,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.used_K = torch.zeros(config.model.codebook_size, dtype=torch.bool, device=device)
        self.store = CheckpointStore(Path(config.observe.run_dir) / "checkpoints", keep=config.checkpoint.keep)

    def resume(self) -> None:
        """Take up the newest checkpoint of the run folder, if there is one.

        Raises:
            InputError: it was made with another configuration.
        """
        folder = self.store.latest()
        if folder is not None:
            metadata = read_metadata(folder)
            self._check_same_configuration(metadata["config"], folder)
            state = torch.load(folder / STATE_FILE, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.used_K = state["used_K"]
            self.step = metadata["step"]
        self.run.truncate_after(self.step)

    def fit(self, stop_requested: Callable[[], bool]) -> None:
        """Train to the last step, or until `stop_requested()`; either way the last step done is saved."""
        total, interval = self.config.train.train_steps, self.config.checkpoint.save_interval
        saved = self.step
        while self.step < total and not stop_requested():
            started = time.perf_counter()
            line = self._train_step(self.step + 1)
            self.step += 1
            seconds = time.perf_counter() - started
            tokens = line.pop("num_tokens")
            self.run.log_metrics(line | {"timing": {"step_seconds": seconds, "tokens_per_second": tokens / seconds}})
            if self.step % self.config.train.eval_interval == 0 or self.step == total:
                self.evaluate()
            if self.step % interval == 0:
                self.save()
                saved = self.step
        if saved != self.step:
            self.save()

    def evaluate(self) -> list[evaluate.Reconstruction]:
        """Log PSNR and use of the codebook on the training media, and refresh reconstruction.png."""
        found = evaluate.reconstruct(self.model, self.media, self.config.train.eval_samples)
        if found:
            self.run.log_metrics({"step": self.step} | evaluate.metrics(found, self.config.model.codebook_size))
            evaluate.save_grid(found, self.run.folder / "reconstruction.png")
        return found

    def save(self) -> None:
        """A checkpoint of all that a resume needs."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "used_K": self.used_K}
        metadata = {"config": as_dict(self.config)}
        self.store.write(self.step, lambda folder: torch.save(state, folder / STATE_FILE), metadata)
        self.run.log_event("save", step=self.step)

    def _initial_model(self) -> MoVQGAN:
        source = self.config.checkpoint.init_from
        if source is not None:
            model = load_vision_tokenizer(source)
            if model.config != self.config.model:
                raise InputError(f"checkpoint.init_from = {source!r}: its shape is not that of section model")
            return model
        torch.manual_seed(torch_generator(self.config.train.seed, "weights").initial_seed())
        model = MoVQGAN(self.config.model)
        if self.config.train.init == "near_identity":
            near_identity(model)
        return model

    def _train_step(self, step: int) -> dict[str, Any]:
        """One optimizer step; the metrics line without timing."""
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

    def _check_same_configuration(self, before: dict[str, Any], folder: Path) -> None:
        now = as_dict(self.config)
        for section in SHAPING_SECTIONS:
            for name, value in now[section].items():
                found = before[section].get(name)
                if found != value:
                    raise InputError(
                        f"{section}.{name} = {value!r}, but {folder} was made with {found!r}: "
                        "set it back, or choose another observe.run_dir"
                    )

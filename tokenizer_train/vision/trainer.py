"""One training of a vision tokenizer: its steps, evaluation, checkpoint, resume."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.store import CheckpointStore, read_metadata
from megatron_ext.config import InputError, as_dict
from megatron_ext.observe import Run
from megatron_ext.runtime import Topology
from megatron_ext.vision import MoVQGAN, load_vision_tokenizer
from tokenizer_train.vision import evaluate
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig
from tokenizer_train.vision.data import TrainingMedia, torch_generator
from tokenizer_train.vision.initialize import near_identity
from tokenizer_train.vision.optimizer import NetworkOptimizer
from tokenizer_train.vision.parallel import Replicas
from tokenizer_train.vision.step import TrainStep

SHAPING_SECTIONS = ("media", "model", "loss", "discriminator", "codebook", "optim", "train")
"""Sections that a resume must find as they were; observe and checkpoint may change."""

STATE_FILE = "state.pt"


class Trainer:
    """What a training holds: the model, the optimizer, what one step does with them, and the steps done."""

    def __init__(
        self, config: VisionTokenizerTrainingConfig, media: TrainingMedia, run: Run, topology: Topology
    ) -> None:
        self.config = config
        self.media = media
        self.run = run
        self.step = 0
        self.device = topology.device
        self.model = self._initial_model().to(self.device).train()
        self.optimizer = NetworkOptimizer(self.model, config.optim, config.train.train_steps)
        self.train_step = TrainStep(config, self.model, self.optimizer, media, Replicas(topology))
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
            self.train_step.load_state_dict(state["train_step"])
            self.step = metadata["step"]
        self.run.truncate_after(self.step)

    def fit(self, stop_requested: Callable[[], bool]) -> None:
        """Train to the last step, or until `stop_requested()`; either way the last step done is saved."""
        total, interval = self.config.train.train_steps, self.config.checkpoint.save_interval
        saved = self.step
        while self.step < total and not stop_requested():
            started = time.perf_counter()
            line = self.train_step.run(self.step + 1)
            self.step += 1
            seconds = time.perf_counter() - started
            tokens, _ = line.pop("num_tokens"), line.pop("num_samples")
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
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "train_step": self.train_step.state_dict(),
        }
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

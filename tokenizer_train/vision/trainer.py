"""One training of a vision tokenizer: its steps, evaluation, checkpoint, resume, on one rank or many.

The state is the same on every rank, so a run may go on with another number of them; rank 0 writes it.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.room import check_room
from megatron_ext.checkpoint.store import CheckpointStore, read_metadata
from megatron_ext.config import InputError, as_dict
from megatron_ext.files import writing
from megatron_ext.observe import Run
from megatron_ext.runtime import Topology
from megatron_ext.runtime.device import peak_memory_bytes, synchronize
from megatron_ext.vision import CodesOrigin, MoVQGAN, load_vision_tokenizer, save_vision_tokenizer
from tokenizer_train.vision.changes import changes
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig
from tokenizer_train.vision.data import TrainingMedia
from tokenizer_train.vision.decoder_alone import train_decoder_alone
from tokenizer_train.vision.ema import WeightAverage
from tokenizer_train.vision.execution import compile_networks, recompute_blocks
from tokenizer_train.vision.optimizer import NetworkOptimizer
from tokenizer_train.vision.parallel import Replicas
from tokenizer_train.vision.run_media import BadMedia, check_same_media
from tokenizer_train.vision.start import initial_tokenizer, saved_shape
from tokenizer_train.vision.step import TrainStep
from tokenizer_train.vision.validation import Validation, save_grid

STATE_FILE = "state.pt"
GRID_FILE = "reconstruction.png"
MOMENTS = 2
"""Numbers that AdamW keeps for each weight."""


@dataclass(kw_only=True)
class TokenizerState:
    """All that must survive a kill. Order of the media, crops and restarts are functions of the seed and the step."""

    step: int = 0
    """Optimizer steps done."""

    consumed_samples: int = 0
    """Pictures and clips trained on, over all ranks."""

    model: MoVQGAN
    """Weights and running statistics."""

    optimizer: NetworkOptimizer
    """Moments of the tokenizer's weights."""

    average: WeightAverage | None
    """The averaged weights, where train.ema_decay asks for them."""

    train_step: TrainStep
    """What the steps themselves keep, such as which codes were in use."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data, the same on every rank."""
        parts = {"model": self.model, "optimizer": self.optimizer, "train_step": self.train_step}
        if self.average is not None:
            parts["average"] = self.average
        saved = {name: part.state_dict() for name, part in parts.items()}
        if self.model.origin is not None:
            saved["origin"] = dataclasses.asdict(self.model.origin)
        return saved | {"step": self.step, "consumed_samples": self.consumed_samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.model.origin = CodesOrigin(**state["origin"]) if "origin" in state else None
        self.optimizer.load_state_dict(state["optimizer"])
        self.train_step.load_state_dict(state["train_step"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.step, self.consumed_samples = state["step"], state["consumed_samples"]


class Trainer:
    """What a training holds, and the loop over its steps. Every rank has one and calls it with the others."""

    def __init__(
        self, config: VisionTokenizerTrainingConfig, media: TrainingMedia, run: Run, topology: Topology
    ) -> None:
        self.config = config
        self.media = media
        self.run = run
        self.topology = topology
        root = Path(config.observe.run_dir) / "checkpoints"
        self.store = CheckpointStore(
            root,
            config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            from_main=topology.from_main,
            barrier=topology.barrier,
        )
        name = topology.from_main(lambda: (folder := self.store.latest()) and folder.name)
        self._latest = root / name if name is not None else None
        start = saved_shape(config, self._latest) if self._latest else initial_tokenizer(config)
        self._units = topology.broadcast(start.units)  # computed: a rank's last bits may be its own
        model = start.model.to(topology.device).train()
        if config.train.trained == "decoder":
            train_decoder_alone(model)
        if config.train.recompute_min_side:
            recompute_blocks(model, config.train.recompute_min_side)
        if config.train.compile:
            compile_networks(model, config.train.precision)
        optimizer = NetworkOptimizer(model, config.optim, config.train.train_steps, units=self._units)
        train_step = TrainStep(config, model, optimizer, media, Replicas(topology))
        # After the train step, which may give all ranks the weights of one.
        average = WeightAverage(model, config.train.ema_decay) if config.train.ema_decay else None
        self.bad_media = BadMedia(media, run, topology)
        self.state = TokenizerState(model=model, optimizer=optimizer, average=average, train_step=train_step)
        topology.from_main(self._prepare_validation)
        topology.from_main(lambda: check_room(root, self._checkpoint_bytes(), config.checkpoint.keep))

    def resume(self) -> None:
        """Take up the newest checkpoint of the run folder, if there is one.

        Raises:
            InputError: it was made with another configuration, or with other media.
        """
        media_change = None
        if (folder := self._latest) is not None:
            metadata = read_metadata(folder)
            changed = changes(metadata["config"], self.config, folder)
            media_change = check_same_media(self.media, metadata.get("media"), str(folder))
            state = torch.load(folder / STATE_FILE, map_location=self.topology.device, weights_only=True)
            self.state.load_state_dict(state)
            for field, (was, value) in changed.items():
                self.run.log_event("change", step=self.state.step, field=field, was=was, value=value)
                self.run.console.print(f"{field} = {value}, and {was} up to step {self.state.step}")
        self.run.truncate_after(self.state.step)
        if media_change is not None:
            self.run.log_event("media_changed", step=self.state.step, **media_change)
        self.bad_media.meet(self.state.step)

    def fit(self, stop_reason: Callable[[int], str | None]) -> str | None:
        """Train to the last step, or until `stop_reason(steps done)` names one, which is returned; either way the last
        step done is saved."""
        state, train = self.state, self.config.train
        saved, reason = state.step, None
        with self.run.profiler(self.topology) as profiler:
            while state.step < train.train_steps and reason is None:
                with profiler.step(state.step + 1):
                    self._train_step()
                if state.step == train.train_steps or (train.eval_interval and state.step % train.eval_interval == 0):
                    self.evaluate()
                if (reason := stop_reason(state.step)) is not None:
                    self.run.log_event("stop", step=state.step, reason=reason)
                elif state.step % self.config.checkpoint.save_interval == 0:
                    self.save()
                    saved = state.step
        if saved != state.step:
            self.save()
        self.bad_media.meet(state.step)
        self.run.log_event("end", step=state.step, finished=state.step >= train.train_steps)
        return reason if state.step < train.train_steps else None

    def evaluate(self) -> None:
        """Log how well media are reconstructed, and draw some. Rank 0 does it alone."""
        self.bad_media.meet(self.state.step)
        if not self.topology.is_main:
            return
        started = time.perf_counter()
        with self.released_weights():
            found, grid = self._validation.judge(self.state.model)
        if grid:
            save_grid(grid, self.run.folder / GRID_FILE)
            self.run.log_picture("reconstruction", self.run.folder / GRID_FILE, step=self.state.step)
            timing = {"eval_seconds": time.perf_counter() - started}
            self.run.log_metrics({"step": self.state.step} | found | {"timing": timing})

    def save(self) -> None:
        """A checkpoint of all that a resume needs, which is a folder of the tokenizer as well.

        Raises:
            InputError: the disk does not take it.
        """
        self.bad_media.meet(self.state.step)
        config, samples = as_dict(self.config), self.state.consumed_samples
        metadata = {"config": config, "consumed_samples": samples, "units": self._units, "media": self.media.identity}

        def write(folder: Path) -> None:
            _save(self.state.state_dict(), folder / STATE_FILE)
            with self.released_weights():
                save_vision_tokenizer(self.state.model, folder)

        started = time.perf_counter()
        try:
            self.store.write(self.state.step, lambda folder: self.topology.from_main(lambda: write(folder)), metadata)
        except OSError as error:  # raised on every rank
            raise InputError(
                f"step {self.state.step} could not be saved in {self.store.root} ({error}): make room or check "
                "permissions, and start again; the run goes on from its last checkpoint"
            ) from error
        # Nothing is written beside the training: it stands still for all of a save.
        seconds = round(time.perf_counter() - started, 3)
        self.run.log_event("save", step=self.state.step, seconds=seconds, blocked_seconds=seconds)

    def released_weights(self) -> contextlib.AbstractContextManager[None]:
        """While open, the model has the weights that are evaluated and released: averaged, where they are."""
        return contextlib.nullcontext() if self.state.average is None else self.state.average.in_place()

    def release(self, folder: Path) -> str:
        """Leave the tokenizer in `folder`, on rank 0; one of the same weights stays as it is. Its identity.

        Raises:
            InputError: the disk does not take it.
        """
        with self.released_weights():
            model = self.state.model
            there = (folder / "model.safetensors").exists()
            if self.topology.is_main and not (there and load_vision_tokenizer(folder).digest == model.digest):
                with writing(folder, "observe.run_dir"):
                    save_vision_tokenizer(model, folder)
            return model.identity

    def _prepare_validation(self) -> None:
        def say(line: str) -> None:
            self.run.console.print(line, markup=False, soft_wrap=True)

        self._validation = Validation(self.config, self.media, self.state.train_step.distances, say)

    def _train_step(self) -> None:
        """One optimizer step and its line in the log."""
        state = self.state
        started = time.perf_counter()
        line = state.train_step.run(state.step + 1)
        state.step += 1
        state.consumed_samples += line.pop("num_samples")
        if state.average is not None:
            state.average.update(state.step)
        synchronize(self.topology.device)
        seconds = time.perf_counter() - started
        timing = {
            "step_seconds": seconds,
            "tokens_per_second": line.pop("num_tokens") / seconds,
            "peak_memory_gib": peak_memory_bytes(self.topology.device) / 2**30,
            "bad_samples": self.bad_media.count,
        }
        self.run.log_metrics(line | {"consumed_samples": state.consumed_samples, "timing": timing})

    def _checkpoint_bytes(self) -> int:
        model = self.state.model
        copies = 1 + (self.state.average is not None) + 1  # the last: the tokenizer as it is released
        moments = MOMENTS * sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
        return copies * sum(tensor.nbytes for tensor in model.state_dict().values()) + moments


def _save(state: dict[str, Any], path: Path) -> None:
    """torch.save, with the system's OSError for a full disk, which torch hides behind one of its own."""
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

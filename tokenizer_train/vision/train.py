"""Train a vision tokenizer on pictures and clips.

The run folder gets config.yaml, metrics.jsonl, checkpoints, reconstruction.png (original above reconstruction) and, at
the end, tokenizer/ with config.json and model.safetensors. Started again, it goes on from the last checkpoint.
"""

import signal
import sys

import torch

from megatron_ext.config import load, run_program, to_yaml
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.observe import Run
from megatron_ext.resilience.signals import StopRequest
from megatron_ext.runtime.device import choose_device, set_threads
from megatron_ext.vision import load_vision_tokenizer, save_vision_tokenizer
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig
from tokenizer_train.vision.data import TrainingMedia
from tokenizer_train.vision.trainer import Trainer

TOKENIZER_FOLDER = "tokenizer"


def main(argv: list[str]) -> None:
    """Run the program with the arguments after its name."""
    config = load(VisionTokenizerTrainingConfig, argv, prog="tokenizer_train.vision.train")
    runtime = RuntimeConfig(num_threads=config.train.num_threads)
    device = choose_device(runtime, local_rank=0)
    set_threads(runtime, device, local_world_size=1)
    media = TrainingMedia(
        config.media,
        seed=config.train.seed,
        chunk_frames=config.model.temporal_downsample_factor,
        spatial_factor=config.model.spatial_factor,
        device=device,
    )
    with (
        StopRequest.on_signals(signal.SIGINT, signal.SIGTERM) as stop,
        Run.open(config.observe, True, to_yaml(config), total_steps=config.train.train_steps) as run,
    ):
        trainer = Trainer(config, media, run, device)
        trainer.resume()
        _announce(trainer, run)
        trainer.fit(lambda: stop.requested)
        for line in media.bad.lines():
            run.console.print(line, markup=False, soft_wrap=True)
        if trainer.step == config.train.train_steps:
            _finish(trainer, run)
    if trainer.step < config.train.train_steps:
        number = signal.Signals[stop.signal_name]
        print(f"{number.name}: saved at step {trainer.step}; start again to go on", flush=True)
        sys.exit(128 + number)


def _announce(trainer: Trainer, run: Run) -> None:
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    where = f"resuming after step {trainer.step}" if trainer.step else "starting"
    run.console.print(
        f"vision tokenizer of {parameters:,} parameters, {len(trainer.media.pictures)} pictures, "
        f"{len(trainer.media.clips)} clips, {torch.get_num_threads()} threads on {trainer.device.type}: {where}",
        soft_wrap=True,
    )


def _finish(trainer: Trainer, run: Run) -> None:
    """Leave the finished tokenizer in the run folder; a finished one of the same weights stays as it is."""
    folder = run.folder / TOKENIZER_FOLDER
    if not (folder / "model.safetensors").exists() or load_vision_tokenizer(folder).identity != trainer.model.identity:
        save_vision_tokenizer(trainer.model, folder)
    run.console.print(f"finished: {folder}, vision tokenizer {trainer.model.identity}", soft_wrap=True)


def cli() -> None:
    """Entry of the console script."""
    run_program(main)


if __name__ == "__main__":
    run_program(main)

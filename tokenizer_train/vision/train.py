"""Train a vision tokenizer on pictures and clips.

python -m tokenizer_train.vision.train --config FILE [--section.field VALUE ...]
torchrun --nproc-per-node N -m tokenizer_train.vision.train --config FILE

The run folder gets config.yaml, metrics.jsonl, events.jsonl, tensorboard/, checkpoints, reconstruction.png (original
above reconstruction) and, at the end, tokenizer/ with config.json and model.safetensors. Started again, also with
another number of ranks, it goes on from the last checkpoint.
"""

import contextlib
import signal
from dataclasses import replace
from pathlib import Path

import torch

from megatron_ext.checkpoint.store import latest_checkpoint, read_metadata
from megatron_ext.config import load, run_program, to_yaml
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.observe import Run
from megatron_ext.resilience import Stopping, StopRequest
from megatron_ext.runtime import Topology
from megatron_ext.runtime.arithmetic import full_fp32
from megatron_ext.runtime.faults import is_told_here
from megatron_ext.runtime.precision import Precision, settle_precision
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig, VisionTrainConfig
from tokenizer_train.vision.data import TrainingMedia
from tokenizer_train.vision.run_media import shared_index
from tokenizer_train.vision.trainer import Trainer

TOKENIZER_FOLDER = "tokenizer"


def main(argv: list[str]) -> None:
    """Run the program with the arguments after its name."""
    config = load(VisionTokenizerTrainingConfig, argv, prog="tokenizer_train.vision.train")
    train(config)


def train(config: VisionTokenizerTrainingConfig) -> None:
    """Train to the end, or as far as asked."""
    with (
        # First: in a job the ranks inherit a SIGTERM that is ignored, and one that comes during the start counts too.
        StopRequest.on_signals(signal.SIGINT, signal.SIGTERM) as signals,
        Topology.start(_runtime(config.train), ParallelConfig()) as topology,
    ):
        precision = _precision(config, topology)
        config = replace(config, train=replace(config.train, precision=precision.name))
        _train(config, topology, precision, signals)


def _train(
    config: VisionTokenizerTrainingConfig, topology: Topology, precision: Precision, signals: StopRequest
) -> None:
    with (
        Run.open(
            config.observe,
            topology.is_main,
            to_yaml(config),
            total_steps=config.train.train_steps,
            environment=topology.environment,
        ) as run,
        contextlib.closing(_media(config, topology)) as media,
        full_fp32(),
    ):
        run.tell_precision(precision)
        trainer = Trainer(config, media, run, topology)
        trainer.resume()
        _announce(trainer)
        reason = trainer.fit(Stopping(config.train, run.folder, topology, signals).reason)
        for line in media.bad.lines():
            run.console.print(line, markup=False, soft_wrap=True)
        if reason is not None:
            run.console.print(f"{reason}: saved at step {trainer.state.step}; start again to go on", soft_wrap=True)
            return
        folder = run.folder / TOKENIZER_FOLDER
        run.console.print(f"finished: {folder}, vision tokenizer {trainer.release(folder)}", soft_wrap=True)


def _media(config: VisionTokenizerTrainingConfig, topology: Topology) -> TrainingMedia:
    return TrainingMedia(
        config.media,
        seed=config.train.seed,
        chunk_frames=config.model.temporal_downsample_factor,
        spatial_factor=config.model.spatial_factor,
        device=topology.device,
        accumulation_steps=config.train.accumulation_steps,
        rank=topology.data_parallel_rank,
        ranks=topology.data_parallel_size,
        index=shared_index(config.media, topology),
    )


def _runtime(train: VisionTrainConfig) -> RuntimeConfig:
    """Weights stay in 32 bits, whatever the networks compute in."""
    return RuntimeConfig(
        device=train.device,
        deterministic=train.deterministic,
        num_threads=train.num_threads,
        distributed_timeout_s=train.distributed_timeout_s,
    )


def _precision(config: VisionTokenizerTrainingConfig, topology: Topology) -> Precision:
    """What the networks compute in, as rank 0 sees it."""

    def begun_in() -> str | None:
        saved = latest_checkpoint(Path(config.observe.run_dir) / "checkpoints")
        return None if saved is None else read_metadata(saved)["config"]["train"].get("precision")

    return topology.from_main(
        lambda: settle_precision(
            config.train.precision, topology.device, begun_in=begun_in, fault_of=lambda name, on_gpu: None
        )
    )


def _announce(trainer: Trainer) -> None:
    parameters = sum(parameter.numel() for parameter in trainer.state.model.parameters())
    learn = "its decoder alone learns, " if trainer.config.train.trained == "decoder" else ""
    topology, step = trainer.topology, trainer.state.step
    ranks = f"{topology.world_size} ranks, " if topology.world_size > 1 else ""
    trainer.run.console.print(
        f"vision tokenizer of {parameters:,} parameters, {learn}{trainer.media.summary()}, "
        f"{ranks}{torch.get_num_threads()} threads on {topology.device.type}: "
        + (f"resuming after step {step}" if step else "starting"),
        soft_wrap=True,
    )


def cli() -> None:
    """Entry of the console script."""
    run_program(main, tells=is_told_here)


if __name__ == "__main__":
    cli()

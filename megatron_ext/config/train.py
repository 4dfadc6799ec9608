"""Section `train`: lengths, batches and stopping."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Lengths, batches and stopping."""

    seq_length: int = 5120
    """Ids in a window (Emu3 section 2.4: 5,120 in stage 1, 131,072 in stage 2)."""

    micro_batch_size: int = 1
    """Windows per data-parallel rank in one forward pass."""

    global_batch_size: int = 1
    """Windows per optimizer step over all ranks; a multiple of micro_batch_size x data-parallel size."""

    train_steps: int
    """Optimizer steps of the whole run."""

    exit_interval: int | None = None
    """Save and stop after a step divisible by this; the next start of the same run goes on."""

    exit_duration: float | None = None
    """Minutes after the start at which to save and stop; the next start of the same run goes on."""

    manual_gc_interval: int = 100
    """Optimizer steps between Python's garbage collections, on all ranks at once: one rank that collects makes all
    wait. 0 leaves them to Python."""

    seed: int = 1234
    """Seed of weights, data order and dropout."""

    eval_interval: int = 0
    """Optimizer steps between evaluations on data.valid; 0 turns evaluation off."""

    eval_steps: int = 1
    """Global batches per evaluation."""

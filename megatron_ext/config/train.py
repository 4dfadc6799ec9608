"""Section `train`: lengths, batches and stopping."""

from dataclasses import dataclass

from megatron_ext.config.section import Count, NonNegative, Number, Section, Seed


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section, section="train"):
    """Lengths, batches and stopping."""

    seq_length: Count = 5120
    """Ids in a window (Emu3 section 2.4: 5,120 in stage 1, 131,072 in stage 2)."""

    micro_batch_size: Count = 1
    """Windows per data-parallel rank in one forward pass."""

    global_batch_size: Count = 1
    """Windows per optimizer step over all ranks; a multiple of micro_batch_size x data-parallel size."""

    global_batch_size_ramp: tuple[Count, Count, Count] | None = None
    """Size of the first global batches, increment, and samples over which the size grows to global_batch_size, in equal
    spans of samples (megatron's rampup_batch_size); null starts at full size."""

    train_steps: Count
    """Optimizer steps of the whole run."""

    exit_interval: Count | None = None
    """Save and stop after a step divisible by this; the next start of the same run goes on."""

    exit_duration: NonNegative | None = None
    """Minutes after the start at which to save and stop; the next start of the same run goes on."""

    manual_gc_interval: Number = 100
    """Optimizer steps between Python's garbage collections, on all ranks at once: one rank that collects makes all
    wait. 0 leaves them to Python."""

    seed: Seed = 1234
    """Seed of weights, data order and dropout."""

    eval_interval: Number = 0
    """Optimizer steps between evaluations on data.valid; 0 turns evaluation off."""

    eval_steps: Count = 1
    """Global batches per evaluation."""

    def batch_size_after(self, consumed_samples: int) -> int:
        """Windows in the global batch that follows `consumed_samples` samples of the run."""
        if self.global_batch_size_ramp is None:
            return self.global_batch_size
        first, increment, samples = self.global_batch_size_ramp
        increments = max(1, (self.global_batch_size - first) // increment)
        return min(self.global_batch_size, first + consumed_samples * increments // samples * increment)

    def samples_of(self, steps: int) -> int:
        """Windows in the first `steps` global batches."""
        consumed, left = 0, steps
        while left and (size := self.batch_size_after(consumed)) < self.global_batch_size:
            consumed, left = consumed + size, left - 1
        return consumed + left * self.global_batch_size

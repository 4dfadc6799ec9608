"""What a run folder says of the run so far."""

from pathlib import Path

from megatron_ext.config import InputError
from megatron_ext.observe.provenance import read_provenance
from megatron_ext.observe.writers import read_json_lines


def consumed_before(run_dir: str | Path, step: int, global_batch_size: int) -> tuple[int, bool]:
    """Samples that the run has consumed before optimizer step `step`, and whether it has taken that step.

    What it has not taken yet is counted on from its last step in batches of `global_batch_size`.

    Raises:
        InputError: it took the step with another global batch.
    """
    path = Path(run_dir) / "metrics.jsonl"
    after = {0: 0} | {
        record["step"]: record["consumed_samples"] for record in read_json_lines(path) if "consumed_samples" in record
    }
    last = max(number for number in after if number < step)
    consumed = after[last] + (step - 1 - last) * global_batch_size
    if step in after and after[step] - consumed != global_batch_size:
        raise InputError(
            f"train.global_batch_size is {global_batch_size}, {path} says that step {step} took "
            f"{after[step] - consumed} windows: give the run's own value"
        )
    return consumed, step in after


def recorded_identity(run_dir: str | Path, name: str) -> str | None:
    """Identity `name` (data, model, vocabulary, vision_tokenizer) of the run's newest start; None where unknown."""
    starts = read_provenance(run_dir)
    return starts[-1].get("identities", {}).get(name) if starts else None

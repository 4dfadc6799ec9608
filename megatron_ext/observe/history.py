"""What a run folder says of the run so far."""

from pathlib import Path

from megatron_ext.config import InputError
from megatron_ext.config.train import TrainConfig
from megatron_ext.files import read_json_lines
from megatron_ext.observe.provenance import read_provenance


def consumed_before(run_dir: str | Path, step: int, train: TrainConfig) -> tuple[int, bool]:
    """Samples that the run has consumed before optimizer step `step`, and whether it has taken that step.

    What it has not taken yet is counted on from its last step in the global batches of `train`.

    Raises:
        InputError: it took the step with another global batch.
    """
    path = Path(run_dir) / "metrics.jsonl"
    records = {record["step"]: record for record in read_json_lines(path) if "consumed_samples" in record}
    if step in records:
        size = records[step]["global_batch_size"]
        consumed = records[step]["consumed_samples"] - size
        if size != train.batch_size_after(consumed):
            raise InputError(
                f"train.global_batch_size gives step {step} {train.batch_size_after(consumed)} windows, {path} says "
                f"that it took {size}: give the run's own value"
            )
        return consumed, True
    last = max((number for number in records if number < step), default=0)
    consumed = records[last]["consumed_samples"] if last else 0
    for _ in range(last + 1, step):
        consumed += train.batch_size_after(consumed)
    return consumed, False


def recorded_identity(run_dir: str | Path, name: str) -> str | None:
    """Identity `name` (data, model, vocabulary, vision_tokenizer) of the run's newest start; None where unknown."""
    starts = read_provenance(run_dir)
    return starts[-1].get("identities", {}).get(name) if starts else None

"""Section `observe`: the run folder and what is written there."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    """The run folder and what is written there."""

    run_dir: str
    """Folder of config.yaml, metrics.jsonl, events.jsonl, tensorboard/ and checkpoints/; an unfinished run in it is
    resumed."""

    log_interval: int = 10
    """Optimizer steps between console lines; metrics.jsonl has every step."""

    tensorboard: bool = True
    """Write TensorBoard event files."""

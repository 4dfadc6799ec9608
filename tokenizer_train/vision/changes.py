"""What a run may be told anew when it is started again, and what must stay as it was."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_ext.config import InputError, as_dict
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig

SHAPING_SECTIONS = ("media", "model", "loss", "discriminator", "codebook", "optim", "train")
"""Sections that say what is computed; observe and checkpoint are free."""

FREE = {
    "media": {
        "valid_inputs", "allow_change", "max_bad_fraction", "index_dir", "workers", "prefetch_batches",
        "cache_megabytes",
    },
    "train": {
        "eval_interval", "eval_samples", "eval_clip_frames", "num_threads", "device", "deterministic",
        "distributed_timeout_s", "recompute_min_side", "compile", "exit_interval", "exit_duration",
    },
}  # fmt: skip
"""Fields of those sections that do not."""

WHICH_MEDIA = ("media.inputs", "media.input_weights")
"""Fields that may change where media.allow_change says so."""

STEERING = {"lr", "min_lr", "lr_warmup_steps", "lr_decay_style", "lr_decay_steps", "clip_grad", "clip_grad_value"}
"""Fields of an optimizer that may change on the way, as after a training that diverged. The others are in its state."""

Change = tuple[Any, Any]
"""What a field was, and what it is."""


def changes(before: dict[str, Any], config: VisionTokenizerTrainingConfig, folder: Path) -> dict[str, Change]:
    """Steering fields that are not those of checkpoint `folder`, which was made with configuration `before`.

    Raises:
        InputError: a field that must stay is another one.
    """
    now, found = as_dict(config), {}
    for section in SHAPING_SECTIONS:
        then = _with_newer_fields(before[section], getattr(config, section))
        for name, was, value in _differences(section, then, now[section]):
            parent, _, field = name.rpartition(".")
            if parent.endswith("optim") and field in STEERING:
                found[name] = (was, value)
            elif name in WHICH_MEDIA and config.media.allow_change:
                continue
            elif field not in FREE.get(parent, ()) and not _is_length(name, config):
                raise InputError(
                    f"{name} = {value!r}, but {folder} was made with {was!r}: set it back, or choose another "
                    "observe.run_dir"
                )
    return found


def _differences(prefix: str, then: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted name, what it was, what it is) of the fields that differ."""
    found = []
    for name, value in now.items():
        if isinstance(value, dict):
            found += _differences(f"{prefix}.{name}", then[name], value)
        elif value != then[name]:
            found.append((f"{prefix}.{name}", then[name], value))
    return found


def _is_length(name: str, config: VisionTokenizerTrainingConfig) -> bool:
    """Whether this is the run's length, and no learning rate depends on it."""
    schedules = [config.optim] + ([config.discriminator.optim] if config.loss.adversarial else [])
    fixed = all(optim.lr_decay_style == "constant" or optim.lr_decay_steps is not None for optim in schedules)
    return name == "train.train_steps" and fixed


def _with_newer_fields(saved: dict[str, Any], config: Any) -> dict[str, Any]:
    """`saved` with the defaults of the fields that the dataclass of `config` has got since: what acted then."""
    filled = dict(saved)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            filled[field.name] = _with_newer_fields(saved.get(field.name, {}), value)
        elif field.name not in saved:
            filled[field.name] = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return filled

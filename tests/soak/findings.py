"""What a reader finds in a run folder after a kill."""

from collections.abc import Set
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.attempt import WEIGHTS
from megatron_ext.checkpoint.examine import METADATA, damages
from megatron_ext.checkpoint.manifest import MANIFEST
from megatron_ext.checkpoint.store import LATEST, PARTIAL, latest_checkpoint
from megatron_ext.checkpoint.streaming import read_weights
from megatron_ext.config import InputError
from megatron_ext.files import read_json_lines


def step_of(name: str) -> int:
    """Of a checkpoint's folder."""
    return int(name.removeprefix("step_"))


def state_of(root: Path, before: Set[str] = frozenset()) -> str:
    """How far the save had come that the kill met, told from what lies in the folder of checkpoints; `before` names
    what earlier kills had left there.
    """
    names = {path.name for path in root.iterdir()} - before
    pointer = root / LATEST
    latest = step_of(pointer.read_text().strip()) if pointer.exists() else 0
    if any(step_of(name) > latest for name in names if name.startswith("step_")):
        return "renamed, `latest` not moved"
    partials = {name.removeprefix(PARTIAL) for name in names if name.startswith(PARTIAL)}
    if any(name.startswith("step_") for name in partials):
        return "old one half removed"
    attempts = [root / (PARTIAL + name) for name in partials if name[:8].isdigit()]
    if not attempts:
        return "no save in progress"
    if any((attempt / MANIFEST).exists() for attempt in attempts):
        return "manifest there, not renamed"
    if any((attempt / WEIGHTS / METADATA).exists() for attempt in attempts):
        return "weights whole, no manifest"
    return "weights not whole"


def examine(run: Path, before: Set[str] = frozenset()) -> dict[str, Any]:
    """State of the save, steps of whole checkpoints, `latest`, the last step of the metrics; `unusable`: lines about
    what is wrong, and none may be: each complete checkpoint is compared with its checksums, the weights of `latest` are
    read.
    """
    root = run / "checkpoints"
    whole, unusable, latest = [], [], None
    for folder in sorted(root.glob("step_*")):
        try:
            found = damages(folder)
        except InputError as error:
            unusable.append(str(error))
            continue
        unusable += [f"{folder.name}: {damage.file} {damage.what}" for damage in found]
        whole += [] if found else [step_of(folder.name)]
    try:
        newest = latest_checkpoint(root)
        if newest is not None:
            latest = step_of(newest.name)
            for weight in read_weights(newest).values():
                weight.read(0, weight.rows)
    except InputError as error:
        unusable.append(str(error))
    metrics = read_json_lines(run / "metrics.jsonl")
    return {
        "state": state_of(root, before),
        "whole": whole,
        "latest": latest,
        "last_step": metrics[-1]["step"] if metrics else 0,
        "unusable": unusable,
    }

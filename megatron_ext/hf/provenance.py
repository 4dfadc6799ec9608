"""Where a release comes from: read from the checkpoint and from the run folder around it.

What a run did not write down is None here and "not recorded" in the model card.
"""

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.checkpoint import read_metadata
from megatron_ext.files import read_json_lines
from megatron_ext.observe.provenance import read_provenance

FORMAT_VERSION = 1
PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "safetensors", "numpy")
"""What a reader of the card wants to know; provenance.json of a run lists every package."""


def provenance_of(checkpoint: Path) -> dict[str, Any]:
    """What is known of a step_XXXXXXXX folder, as JSON can hold it.

    Raises:
        InputError: not a checkpoint.
    """
    metadata = read_metadata(checkpoint)
    state = metadata.get("train_state") or {}
    config = yaml.safe_load((checkpoint / "config.yaml").read_text(encoding="utf-8"))
    run = checkpoint.parent.parent
    starts = [start for start in read_provenance(run) if start.get("step", 0) <= metadata["step"]] if state else []
    return {
        "format_version": FORMAT_VERSION,
        "step": metadata["step"] if state else None,
        "consumed_samples": state.get("consumed_samples"),
        "consumed_tokens": state.get("consumed_tokens"),
        "init_from": config.get("checkpoint", {}).get("init_from"),
        "vision_tokenizer": metadata.get("vision_tokenizer"),
        "starts": [_start(start) for start in starts],
        "datasets": _datasets(config, starts, state.get("blend")),
        "losses": _losses(run / "metrics.jsonl", metadata["step"]) if state else {},
        "config": config,
        "exported_with": _versions({name: _version(name) for name in ("megatron-ext-emu3", *PACKAGES)}),
    }


def _start(start: dict[str, Any]) -> dict[str, Any]:
    """The part of a start that means something to others: neither paths nor names of machines."""
    wanted = ("step", "time", "git", "python", "ranks", "hardware", "identities")
    facts = {name: start.get(name) for name in wanted}
    return {**facts, "packages": _versions(start.get("packages") or {}) or None}


def _versions(packages: dict[str, str | None]) -> dict[str, str]:
    names = {name.lower().replace("_", "-"): version for name, version in packages.items()}
    return {name: names[name] for name in ("megatron-ext-emu3", *PACKAGES) if names.get(name)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _datasets(
    config: dict[str, Any], starts: list[dict[str, Any]], read: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Each dataset of the training blend: its share, the ids seen of it, the hash of its manifest.

    The checkpoint says how many windows were seen, in `read`; the hash is the newest start's, or that of the file if it
    is still there.
    """
    blend = config.get("data", {}).get("train") or []
    if not blend:
        return []
    weights = [dataset.get("weight", 1.0) for dataset in blend]
    windows = [dataset["consumed"] for dataset in read["datasets"]] if read else None
    hashes = dict(starts[-1].get("manifests") or {}) if starts else {}
    return [
        {
            "name": Path(dataset["prefix"]).name,
            "weight": weight,
            "tokens": None if windows is None else windows[n] * config["train"]["seq_length"],
            "manifest_sha256": hashes.get(dataset["prefix"]) or _sha256(Path(f"{dataset['prefix']}.manifest.json")),
        }
        for n, (dataset, weight) in enumerate(zip(blend, weights, strict=True))
    ]


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _losses(path: Path, step: int) -> dict[str, float]:
    """The last training and validation losses up to `step`, with their steps."""
    losses: dict[str, float] = {}
    for line in read_json_lines(path):
        if line.get("step", step + 1) <= step:
            kind = {name: line[name] for name in line if name.startswith(("loss", "valid_loss"))}
            if kind:
                prefix = "" if "loss" in kind else "valid_"
                losses |= {f"{prefix}step": line["step"], **kind}
    return losses

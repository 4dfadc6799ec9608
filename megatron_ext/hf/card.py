"""The model card of a release: README.md, with front matter for the hub, use, format and provenance."""

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

UNKNOWN = "not recorded"


def model_card(*, title: str, front: Mapping[str, Any], body: str, provenance: Mapping[str, Any]) -> str:
    """The whole text.

    Args:
        title: the headline.
        front: fields of the hub's front matter.
        body: Markdown on what the folder holds and how to use it.
        provenance: what `provenance_of` returns.
    """
    matter = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)
    return f"---\n{matter}---\n\n# {title}\n\n{body.strip()}\n\n{_provenance(provenance)}"


def _provenance(facts: Mapping[str, Any]) -> str:
    losses = facts["losses"]
    rows = {
        "training step": _number(facts["step"]),
        "ids seen": _number(facts["consumed_tokens"]),
        "began from": facts["init_from"] or ("random weights" if facts["starts"] else UNKNOWN),
        "vision tokenizer of the data": facts["vision_tokenizer"] or UNKNOWN,
        "losses": ", ".join(f"{name} {value:.4f}" for name, value in losses.items() if _is_loss(name, value))
        or UNKNOWN,
        "exported with": _versions(facts["exported_with"]),
    }
    tables = [
        _table(("what", "value"), rows.items()),
        "Starts of the run (code, packages and machine of each):",
        _table(("from step", "time", "git commit", "packages", "machine"), map(_start, facts["starts"])),
        "Training data:",
        _table(("dataset", "weight", "ids seen", "SHA-256 of its manifest"), map(_dataset, facts["datasets"])),
        "Training configuration:",
        f"```yaml\n{yaml.safe_dump(facts['config'], sort_keys=False, allow_unicode=True)}```",
    ]
    return "## Provenance\n\nAlso in `provenance.json`.\n\n" + "\n\n".join(tables) + "\n"


def _start(start: Mapping[str, Any]) -> tuple[str, ...]:
    git, hardware = start["git"], start["hardware"] or {}
    commit = UNKNOWN if git is None else git["commit"] + (" with local changes" if git.get("dirty") else "")
    gpus = hardware.get("gpus") or []
    machine = ", ".join([str(hardware.get("cpu", UNKNOWN)), *gpus])
    ranks = f"{start['ranks']} ranks; " if start["ranks"] else ""
    return (
        _number(start["step"]),
        start["time"] or UNKNOWN,
        commit,
        _versions(start["packages"] or {}),
        ranks + machine,
    )


def _dataset(dataset: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        dataset["name"],
        f"{dataset['weight']:g}",
        _number(dataset["tokens"]),
        dataset["manifest_sha256"] or UNKNOWN,
    )


def _versions(packages: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items()) or UNKNOWN


def _is_loss(name: str, value: object) -> bool:
    return isinstance(value, float) and not name.endswith("step")


def _number(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    if not lines:
        return f"{UNKNOWN}."
    return "\n".join(f"| {line} |" for line in (" | ".join(head), " | ".join("---" for _ in head), *lines))

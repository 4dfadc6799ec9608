"""What a folder of tokenized media holds."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np


def contents(folder: Path) -> dict[str, tuple[np.ndarray, dict]]:
    """All samples of the shards: key -> (codes, fields)."""
    found = {}
    for name in sorted(folder.glob("*.tar")):
        with tarfile.open(name) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        for file, content in files.items():
            if file.endswith(".json"):
                key = file.removesuffix(".json")
                found[key] = (np.load(io.BytesIO(files[f"{key}.codes.npy"])), json.loads(content))
    return found


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def skipped(folder: Path) -> dict[str, str]:
    """Key -> why it was skipped."""
    lines = (folder / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    return {item["key"]: item["reason"] for item in map(json.loads, lines)}

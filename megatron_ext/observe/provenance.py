"""Where a run comes from: code, packages, machine and data of each of its starts, in RUN_DIR/provenance.json."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_ext.config import InputError
from megatron_ext.files import replacing
from megatron_ext.runtime.hardware import describe_hardware

FILE = "provenance.json"
CODE_ROOT = Path(__file__).parents[2]
"""The folder that holds the package: the repository's, or site-packages."""


def collect_provenance(config: Mapping[str, Any]) -> dict[str, Any]:
    """What can be told when a start begins, as JSON can hold it; `config` is the run's configuration as plain data.

    A run never fails for it: what cannot be found out is empty, and stands under `untold` with the reason.
    """
    found: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "ranks": int(os.environ.get("WORLD_SIZE", 1)),
        "python": platform.python_version(),
    }
    sources: dict[str, Callable[[], Any]] = {
        "git": lambda: git_state(CODE_ROOT),
        "packages": installed_packages,
        "hardware": describe_hardware,
        "manifests": lambda: manifest_hashes(config),
    }
    untold = {}
    for name, look in sources.items():
        try:
            found[name] = look()
        except Exception as error:
            found[name], untold[name] = {}, f"{type(error).__name__}: {error}"
    return found | ({"untold": untold} if untold else {})


def git_state(root: Path) -> dict[str, Any] | None:
    """Commit of the repository at `root`, and whether files it tracks were changed; None where there is no git.

    A repository around `root` (a virtual environment lies in the user's own) says nothing about this code.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top) != root.resolve():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changes)} if commit else None


def installed_packages() -> dict[str, str]:
    """Version of every installed distribution; what an installation that was cut short left has no name."""
    versions = {package.name: package.version for package in importlib.metadata.distributions() if package.name}
    return {name: versions[name] for name in sorted(versions, key=str.lower)}


def manifest_hashes(config: Mapping[str, Any]) -> dict[str, str | None]:
    """SHA-256 of PREFIX.manifest.json, which holds the hashes of the dataset's files, for every `prefix` that the
    configuration names; None where it is absent."""
    paths = {prefix: Path(f"{prefix}.manifest.json") for prefix in sorted(set(_prefixes(config)))}
    return {
        prefix: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for prefix, path in paths.items()
    }


def append_provenance(folder: Path, entry: Mapping[str, Any]) -> None:
    """Add a start to the run folder's file; it is replaced at once, by rename. One that cannot be read is kept beside
    it, as provenance.json.damaged, and a new one begins."""
    try:
        earlier = read_provenance(folder)
    except InputError:
        os.replace(folder / FILE, folder / f"{FILE}.damaged")
        earlier = []
    content = json.dumps([*earlier, entry], indent=1, ensure_ascii=False) + "\n"
    with replacing(folder / FILE) as temporary:
        temporary.write_text(content, encoding="utf-8")


def read_provenance(folder: str | Path) -> list[dict[str, Any]]:
    """The starts of a run, in order; none where the folder has no file.

    Raises:
        InputError: the file is no list of objects.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): move it away, the next start begins a new one") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path} is no list of starts: move it away, the next start begins a new one")
    return entries


def _prefixes(config: Any) -> Iterator[str]:
    """Every `prefix` in a configuration, however deep."""
    if isinstance(config, Mapping):
        if isinstance(config.get("prefix"), str):
            yield config["prefix"]
        config = list(config.values())
    if isinstance(config, list):
        for item in config:
            yield from _prefixes(item)


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints; None where it is missing, refuses, or does not answer."""
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None

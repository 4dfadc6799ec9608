"""Safetensors folders, one file or many with an index, read and written tensor by tensor."""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_ext.config import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # transformers' own default; also what BAAI published


class WeightsReader:
    """The tensors of a folder by name; a tensor is read when asked for."""

    def __init__(self, folder: str | Path):
        """Raises InputError when the folder holds no safetensors, or files that cannot be read."""
        self.folder = Path(folder)
        index = self.folder / INDEX
        if index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        elif (self.folder / SINGLE).is_file():
            files = [SINGLE]
        else:
            raise InputError(f"{self.folder}: neither {SINGLE} nor {INDEX} is there; give a Hugging Face model folder")
        self._stack = contextlib.ExitStack()
        self._file_of = {}
        for file in files:
            try:
                handle = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise InputError(f"{self.folder / file}: cannot be read ({error}); copy the folder again") from None
            self._file_of |= dict.fromkeys(handle.keys(), handle)

    def __enter__(self) -> "WeightsReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = SHARD_BYTES
) -> dict[str, str]:
    """Write (name, tensor) pairs as model*.safetensors into `folder`; at most one shard is held in memory.

    Files of an earlier or interrupted export are removed first. Returns name -> file.

    Raises:
        ValueError: a name comes twice.
    """
    for stale in (*folder.glob("model*.safetensors*"), *folder.glob("part-*.tmp")):
        stale.unlink()
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal held, size
        save_file(held, folder / f"part-{len(shards):05d}.tmp", metadata={"format": "pt"})
        shards.append(list(held))
        held, size = {}, 0

    total = 0
    for name, tensor in tensors:
        if name in held or any(name in shard for shard in shards):
            raise ValueError(f"tensor {name!r} is written twice")
        if held and size + tensor.nbytes > shard_bytes:
            flush()
        # A copy: a part of a larger tensor would drag the whole storage into the file.
        held[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    for number, name in enumerate(names):
        part = folder / f"part-{number:05d}.tmp"
        part.chmod(0o644)  # safetensors gives its files to their owner alone
        os.replace(part, folder / name)
    files = {tensor: name for shard, name in zip(shards, names, strict=True) for tensor in shard}
    if len(names) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        write_json(folder / INDEX, index)
    return files


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, under a temporary name first."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)

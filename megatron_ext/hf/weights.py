"""Safetensors folders, one file or many with an index, read and written by rows.

Not through the library `safetensors`, whose reader maps whole files and whose writer wants whole tensors: what a
conversion has touched would count as its memory. The format is a page long (https://github.com/huggingface/safetensors):
the length of a JSON header, the header, the tensors' bytes one after another.
"""

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_ext.checkpoint.lazy import LazyTensor
from megatron_ext.config import InputError
from megatron_ext.files import replacing

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # transformers' own default; also what BAAI published

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class WeightsReader:
    """The tensors of a folder by name; their rows are read when asked for."""

    def __init__(self, folder: str | Path):
        """Raises InputError when the folder holds no safetensors, or files that are incomplete."""
        self.folder = Path(folder)
        index = self.folder / INDEX
        if index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        elif (self.folder / SINGLE).is_file():
            files = [SINGLE]
        else:
            raise InputError(f"{self.folder}: neither {SINGLE} nor {INDEX} is there; give a Hugging Face model folder")
        self._tensors: dict[str, LazyTensor] = {}
        for file in files:
            self._tensors |= _read_header(self.folder / file)

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._tensors)

    def __getitem__(self, name: str) -> LazyTensor:
        """Raises InputError when there is no such tensor."""
        try:
            return self._tensors[name]
        except KeyError:
            raise InputError(f"{self.folder}: tensor {name} is missing; is the download complete?") from None


def _read_header(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
        header.pop("__metadata__", None)
        tensors = {name: _lazy(path, 8 + length, fields) for name, fields in header.items()}
        end = 8 + length + max((fields["data_offsets"][1] for fields in header.values()), default=0)
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error or type(error).__name__}); copy the folder again") from None
    if size != end:
        raise InputError(f"{path}: has {size} bytes, its header says {end}; copy the folder again")
    return tensors


def _lazy(path: Path, data_start: int, fields: dict[str, Any]) -> LazyTensor:
    dtype, shape = _DTYPES[fields["dtype"]], tuple(fields["shape"])
    begin, end = fields["data_offsets"]
    if torch.Size(shape).numel() * dtype.itemsize != end - begin:
        raise ValueError(f"{shape} of {fields['dtype']} is not {end - begin} bytes")
    row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize

    def read(start: int, stop: int) -> Tensor:
        rows = torch.empty((stop - start, *shape[1:]) if shape else (), dtype=dtype)
        with path.open("rb", buffering=0) as file:
            file.seek(data_start + begin + start * row_bytes)
            _fill(file, memoryview(rows.reshape(-1).view(torch.uint8).numpy()))
        return rows

    return LazyTensor(shape=shape, dtype=dtype, read=read)


def _fill(file: BinaryIO, buffer: memoryview) -> None:
    while buffer:  # one call reads at most 2 GiB
        if not (count := file.readinto(buffer)):
            raise InputError(f"{file.name}: ends too early; copy the folder again")
        buffer = buffer[count:]


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, LazyTensor]], shard_bytes: int = SHARD_BYTES
) -> dict[str, str]:
    """Write (name, tensor) pairs as model*.safetensors into `folder`, a piece at a time. Returns name -> file.

    Raises:
        ValueError: a name comes twice.
    """
    shards: list[dict[str, LazyTensor]] = [{}]
    for name, tensor in tensors:
        if any(name in shard for shard in shards):
            raise ValueError(f"tensor {name!r} is written twice")
        if shards[-1] and sum(held.nbytes for held in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard)
    files = {tensor: name for shard, name in zip(shards, names, strict=True) for tensor in shard}
    if count > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    return files


def _write_file(path: Path, tensors: dict[str, LazyTensor]) -> None:
    """One safetensors file, byte for byte what the library `safetensors` writes."""
    # Wide types first keeps every tensor aligned, which readers that map the file rely on.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        fields = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[name] = fields
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            for start, stop in tensor.ranges():
                piece = tensor.read(start, stop).detach().cpu().contiguous()
                file.write(memoryview(piece.reshape(-1).view(torch.uint8).numpy()))


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""A decoder checkpoint's weights tensor by tensor, without a model and in bounded memory.

Names are megatron-core's, of its fused modules, one per layer: `decoder.layers.3.mlp.linear_fc1.weight`. On disk all
layers of a parameter share one entry with the layer as its first dimension (transformer_block.py,
sharded_state_dict), in the files of torch.distributed.checkpoint, which megatron-core calls `torch_dist`.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ext.checkpoint.attempt import WEIGHTS
from megatron_ext.checkpoint.consistency import unlike
from megatron_ext.checkpoint.lazy import LazyTensor
from megatron_ext.checkpoint.store import CheckpointStore, check_contents
from megatron_ext.config.errors import InputError
from megatron_ext.vocab import Vocabulary

PREFIX = "model."
MASTERS = "optimizer.state.param." + PREFIX
"""Where a fully reshardable optimizer has its master weights; dp_reshardable buckets have no names of parameters."""
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def write_weights(
    folder: Path, tensors: Mapping[str, LazyTensor], vocab: Vocabulary, config_yaml: str, metadata: Mapping[str, Any]
) -> Path:
    """Write a weights-only checkpoint (step 0) that checkpoint.init_from takes, into the store at `folder`.

    Args:
        tensors: every parameter of the unsharded decoder by its name.
        metadata: what `read_metadata` returns.
    """

    def write(body: Path) -> None:
        (body / "config.yaml").write_text(config_yaml, encoding="utf-8")
        vocab.save(body / "vocabulary")
        writer = dcp.FileSystemWriter(body / WEIGHTS, single_file_per_rank=True, sync_files=False)  # the store syncs
        dcp.save({}, storage_writer=writer, planner=_Save(tensors), no_dist=True)
        torch.save({}, body / WEIGHTS / "common.pt")  # megatron-core's place for what is no tensor
        save_config(CheckpointingConfig("torch_dist", 1), str(body / WEIGHTS))

    return CheckpointStore(folder, keep=1).write(0, write, dict(metadata))


def read_weights(folder: Path, *, exact: bool = False) -> dict[str, LazyTensor]:
    """Every parameter of a checkpoint's decoder by its name, in the order of the layers.

    Reading needs memory for twice the largest shard that a rank has saved of one tensor.

    Args:
        exact: take the fp32 master weights where the checkpoint has them and the weights are rounded. Reading raises
            InputError where they do not round to the weights.

    Raises:
        InputError: not a complete checkpoint, or a damaged one.
    """
    check_contents(folder)
    reader = dcp.FileSystemReader(folder / WEIGHTS)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    weights = _read(reader, metadata, PREFIX)
    if not exact:
        return weights
    masters = _read(reader, metadata, MASTERS)
    return {
        name: _rounding_to(weight, masters[name], name, folder) if _is_rounded(weight, masters.get(name)) else weight
        for name, weight in weights.items()
    }


def _read(reader: dcp.FileSystemReader, metadata: Metadata, prefix: str) -> dict[str, LazyTensor]:
    """Every tensor below `prefix` by its parameter's name, in the order of the layers."""
    entries = {
        key.removeprefix(prefix): entry
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    layered = {key: entry for key, entry in entries.items() if key.startswith("decoder.layers.")}
    layers = max((entry.size[0] for entry in layered.values()), default=0)
    names = [
        *((key, key, None) for key in entries if key not in layered),
        *((key.replace(".layers.", f".layers.{layer}."), key, layer) for layer in range(layers) for key in layered),
    ]
    bands = _Bands(reader)
    return {name: bands.lazy(prefix + key, entries[key], layer) for name, key, layer in names}


def _is_rounded(weight: LazyTensor, master: LazyTensor | None) -> bool:
    return master is not None and weight.dtype.itemsize < master.dtype.itemsize


def _rounding_to(weight: LazyTensor, master: LazyTensor, name: str, folder: Path) -> LazyTensor:
    """The master weights, compared with the weights as they are read."""

    def read(start: int, stop: int) -> Tensor:
        exact = master.read(start, stop)
        if differing := unlike(exact, weight.read(start, stop)):
            raise InputError(
                f"{folder} contradicts itself (master weights do not round to the weights: {differing:,} elements of "
                f"{name}): its weights are right, take them with dtype bfloat16"
            )
        return exact

    return LazyTensor(shape=master.shape, dtype=master.dtype, read=read)


def _place(name: str) -> tuple[str, int | None]:
    """A parameter's entry on disk and its layer there."""
    match = _LAYER.fullmatch(name)
    return (f"{PREFIX}decoder.layers.{match[2]}", int(match[1])) if match else (PREFIX + name, None)


class _Save(SavePlanner):
    """Plans one write per piece of a tensor; the writer asks for each piece when its turn comes."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self._tensors = tensors
        self._pieces: dict[MetadataIndex, tuple[LazyTensor, int, int]] = {}
        self._entries: dict[str, TensorStorageMetadata] = {}

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """The plan follows from the tensors alone."""

    def create_local_plan(self) -> SavePlan:
        places = [(*_place(name), tensor) for name, tensor in self._tensors.items()]
        layers = 1 + max((layer for _, layer, _ in places if layer is not None), default=0)
        items = [item for key, layer, tensor in places for item in self._items(key, layer, layers, tensor)]
        return SavePlan(items)

    def _items(self, key: str, layer: int | None, layers: int, tensor: LazyTensor) -> Iterator[WriteItem]:
        first = () if layer is None else (layer,)
        size = torch.Size(tensor.shape if layer is None else (layers, *tensor.shape))
        properties = TensorProperties(dtype=tensor.dtype)
        entry = self._entries.setdefault(key, TensorStorageMetadata(properties, size, []))
        for start, stop in tensor.ranges():
            chunk = ChunkStorageMetadata(
                offsets=torch.Size((*first, start, *(0 for _ in tensor.shape[1:]))),
                sizes=torch.Size((*(1 for _ in first), stop - start, *tensor.shape[1:])),
            )
            index = MetadataIndex(key, chunk.offsets)
            entry.chunks.append(chunk)
            self._pieces[index] = tensor, start, stop
            yield WriteItem(index, WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, size))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, Metadata(dict(self._entries))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        tensor, start, stop = self._pieces[write_item.index]
        return tensor.read(start, stop).reshape(write_item.tensor_data.chunk.sizes)


class _Bands:
    """Reads tensors in bands: rows between two neighbouring edges of the shards that ranks have saved, all columns.

    One band is kept: rows are asked for in order, and a band can be most of what fits into memory.
    """

    def __init__(self, reader: dcp.FileSystemReader) -> None:
        self._reader = reader
        self._kept: tuple[MetadataIndex, Tensor] | None = None

    def lazy(self, key: str, entry: TensorStorageMetadata, layer: int | None) -> LazyTensor:
        """One parameter of one layer."""
        first = () if layer is None else (layer,)
        axis = len(first)
        shape = tuple(entry.size[axis:])
        edges = sorted({chunk.offsets[axis] for chunk in entry.chunks} | {shape[0]})

        def read(start: int, stop: int) -> Tensor:
            parts = []
            for low, high in pairwise(edges):
                if low < stop and high > start:
                    offsets = torch.Size((*first, low, *(0 for _ in shape[1:])))
                    sizes = torch.Size((*(1 for _ in first), high - low, *shape[1:]))
                    band = self._band(key, entry, ChunkStorageMetadata(offsets=offsets, sizes=sizes))
                    parts.append(band.reshape(sizes[axis:])[max(start, low) - low : min(stop, high) - low])
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return LazyTensor(shape=shape, dtype=entry.properties.dtype, read=read)

    def _band(self, key: str, entry: TensorStorageMetadata, chunk: ChunkStorageMetadata) -> Tensor:
        index = MetadataIndex(key, chunk.offsets)
        if self._kept is None or self._kept[0] != index:
            self._kept = None  # before another one is made
            band = torch.empty(chunk.sizes, dtype=entry.properties.dtype)
            items = create_read_items_for_chunk_list(key, entry, [chunk])
            self._reader.read_data(LoadPlan(items), _Load(band)).wait()
            self._kept = index, band
        return self._kept[1]


class _Load(LoadPlanner):
    """Hands the reader the places of one tensor to fill."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        place = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._target[tuple(slice(offset, offset + length) for offset, length in place)]

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: the items are given to the reader directly."""

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise TypeError(f"{read_item.dest_index} is no tensor")

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The tensor was filled in place."""

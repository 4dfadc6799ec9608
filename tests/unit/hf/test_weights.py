"""Safetensors folders: one file or several, names once, nothing stale."""

import json
from pathlib import Path

import pytest
import torch

from megatron_ext.config import InputError
from megatron_ext.hf.weights import INDEX, SINGLE, WeightsReader, write_weights

TENSORS = {f"layer.{number}.weight": torch.randn(4, number + 1) for number in range(6)}


@pytest.mark.parametrize(("shard_bytes", "files"), [(10**9, 1), (100, 4), (1, 6)])
def test_what_is_written_is_read(tmp_path: Path, shard_bytes: int, files: int) -> None:
    file_of = write_weights(tmp_path, TENSORS.items(), shard_bytes)
    assert len(set(file_of.values())) == files == len(list(tmp_path.glob("model*.safetensors")))
    assert not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / INDEX).exists() == (files > 1)
    with WeightsReader(tmp_path) as reader:
        assert reader.names() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert torch.equal(reader[name], tensor)


def test_an_earlier_export_leaves_nothing(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS.items(), shard_bytes=100)
    (tmp_path / "part-00007.tmp").write_bytes(b"of an interrupted export")
    write_weights(tmp_path, TENSORS.items())
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


def test_the_index_is_that_of_transformers(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS.items(), shard_bytes=100)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"].keys() == TENSORS.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())


def test_a_view_is_written_alone(tmp_path: Path) -> None:
    write_weights(tmp_path, [("part", torch.zeros(1000, 8)[:2])])
    assert (tmp_path / SINGLE).stat().st_size < 1000


def test_a_name_twice_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="written twice"):
        write_weights(tmp_path, [("a", torch.zeros(1)), ("a", torch.zeros(1))])


def test_unreadable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither"):
        WeightsReader(tmp_path)
    (tmp_path / SINGLE).write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        WeightsReader(tmp_path)

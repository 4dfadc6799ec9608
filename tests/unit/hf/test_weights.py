"""Safetensors folders: one file or several, byte for byte the library's, names once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import megatron_ext.checkpoint.lazy as lazy_module
from megatron_ext.checkpoint.lazy import LazyTensor
from megatron_ext.config import InputError
from megatron_ext.hf.weights import INDEX, SINGLE, WeightsReader, write_weights
from tests.support.releases import lazy

TENSORS = {f"layer.{number}.weight": torch.randn(4, number + 1) for number in range(6)}
MIXED = {
    "number": torch.tensor(7),
    "half": torch.randn(3, 5).bfloat16(),
    "vector": torch.randn(9),
    "kernel": torch.randn(2, 3, 1, 1),
    "empty": torch.zeros(0, 4),
}


@pytest.mark.parametrize(("shard_bytes", "files"), [(10**9, 1), (100, 4), (1, 6)])
def test_what_is_written_is_read(tmp_path: Path, shard_bytes: int, files: int) -> None:
    file_of = write_weights(tmp_path, lazy(TENSORS).items(), shard_bytes)
    assert len(set(file_of.values())) == files == len(list(tmp_path.glob("model*.safetensors")))
    assert (tmp_path / INDEX).exists() == (files > 1)
    reader = WeightsReader(tmp_path)
    assert reader.names() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(reader[name].whole(), tensor)
        assert torch.equal(reader[name].read(1, 3), tensor[1:3])


def test_files_are_those_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte, whatever the size of the pieces; and its files are read."""
    save_file(MIXED, tmp_path / "library", metadata={"format": "pt"})
    for number, piece_bytes in enumerate((1, 10, 1 << 20)):
        monkeypatch.setattr(lazy_module, "PIECE_BYTES", piece_bytes)
        (tmp_path / str(number)).mkdir()
        write_weights(tmp_path / str(number), lazy(MIXED).items())
        assert (tmp_path / str(number) / SINGLE).read_bytes() == (tmp_path / "library").read_bytes()
    reader = WeightsReader(tmp_path / "0")
    for name, tensor in MIXED.items():
        assert reader[name].dtype == tensor.dtype and torch.equal(reader[name].whole(), tensor)
        assert torch.equal(load_file(tmp_path / "0" / SINGLE)[name], tensor)


def test_the_index_is_that_of_transformers(tmp_path: Path) -> None:
    write_weights(tmp_path, lazy(TENSORS).items(), shard_bytes=100)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"].keys() == TENSORS.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())


def test_a_name_twice_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="written twice"):
        write_weights(tmp_path, [("a", LazyTensor.of(torch.zeros(1)))] * 2)


def test_unreadable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither"):
        WeightsReader(tmp_path)
    for content in (b"not safetensors", b"", b"\x08\0\0\0\0\0\0\0[1, 2,3]", b"\x02\0\0\0\0\0\0\0{"):
        (tmp_path / SINGLE).write_bytes(content)
        with pytest.raises(InputError, match="cannot be read"):
            WeightsReader(tmp_path)


def test_an_incomplete_download_is_refused(tmp_path: Path) -> None:
    write_weights(tmp_path, lazy(TENSORS).items())
    content = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(content[:-1])
    with pytest.raises(InputError, match=f"has {len(content) - 1} bytes, its header says {len(content)}"):
        WeightsReader(tmp_path)
    write_weights(tmp_path, lazy(TENSORS).items(), shard_bytes=100)
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(InputError, match="model-00002-of-00004.safetensors: cannot be read"):
        WeightsReader(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_weights(tmp_path, lazy(TENSORS).items())
    with pytest.raises(InputError, match="tensor b is missing"):
        WeightsReader(tmp_path)["b"]

"""Emu3-8B's full width converts both ways in under 4 GB: a child process tells its largest resident size.

One layer, the whole vocabulary, BAAI's names and several files: 6.9 GB in float32. The weights are zeros but for marked
rows, so that the source is a sparse file and costs no disk.
"""

import json
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_ext.config.model import ModelConfig
from megatron_ext.hf.decoder import their_shapes
from megatron_ext.hf.weights import INDEX, WeightsReader
from megatron_ext.plan import DecoderShape
from megatron_ext.vocab import VocabLayout

LIMIT_BYTES = 4_000_000_000
SHARD_BYTES = 5_000_000_000
SHAPES = their_shapes(DecoderShape.of(ModelConfig(preset="emu3_8b", num_layers=1)), VocabLayout.emu3().size)
CONFIG = {
    "model_type": "Emu3", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 9216, "rms_norm_eps": 1e-5,
    "rope_theta": 1e6, "vocab_size": 184622, "bos_token_id": 151849,
}  # fmt: skip

CHILD = """
import resource, sys
from tools.convert_checkpoint import main
source, ours, back = sys.argv[1:]
main(["from-hf", "--hf", source, "--output", ours, "--dtype", "bfloat16"])
main(["to-hf", "--checkpoint", ours, "--output", back, "--format", "baai", "--dtype", "bfloat16", "--check", "false"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def marked_rows(name: str) -> dict[int, np.ndarray]:
    """Row -> values, exact in bfloat16: the first and last rows and some between."""
    shape = SHAPES[name]
    generator = np.random.default_rng(len(name))
    numbers = sorted({0, shape[0] - 1, *generator.integers(0, shape[0], 9).tolist()})
    columns = shape[1] if len(shape) > 1 else 1
    return {row: generator.integers(-128, 128, columns).astype(np.float32) for row in numbers}


def size_of(name: str) -> int:
    """Bytes in float32."""
    return 4 * int(np.prod(SHAPES[name]))


def write_sparse(folder: Path) -> None:
    """The folder in float32, as BAAI publishes it."""
    files: list[list[str]] = [[]]
    for name, shape in SHAPES.items():
        if (
            files[-1]
            and sum(4 * int(np.prod(SHAPES[held])) for held in files[-1]) + 4 * int(np.prod(shape)) > SHARD_BYTES
        ):
            files.append([])
        files[-1].append(name)
    weight_map = {}
    for number, names in enumerate(files, start=1):
        path = folder / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        header, end = {}, 0
        for name in names:
            begin, end = end, end + size_of(name)
            header[name] = {"dtype": "F32", "shape": SHAPES[name], "data_offsets": [begin, end]}
            weight_map[name] = path.name
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
            for name in names:
                begin = 8 + len(text) + header[name]["data_offsets"][0]
                for row, values in marked_rows(name).items():
                    file.seek(begin + row * values.nbytes)
                    file.write(values.tobytes())
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture
def roomy() -> Iterator[Path]:
    """A folder for 7 GB that is gone afterwards; in memory where there is enough, because disks take minutes."""
    shared = Path("/dev/shm")
    in_memory = shared.is_dir() and shutil.disk_usage(shared).free > 9e9 and psutil.virtual_memory().available > 13e9
    with tempfile.TemporaryDirectory(dir=shared if in_memory else None) as folder:
        yield Path(folder)


@pytest.mark.timeout(600)
def test_full_width_in_four_gigabytes(roomy: Path) -> None:
    source, back = roomy / "source", roomy / "back"
    source.mkdir()
    write_sparse(source)
    assert sum(path.stat().st_size for path in source.glob("*.safetensors")) > 6.9e9
    arguments = [str(source), str(roomy / "ours"), str(back)]
    child = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]
    peak = int(child.stdout.splitlines()[-1])
    assert peak < LIMIT_BYTES, f"{peak / 1e9:.2f} GB"  # measured 0.7 GB
    reader = WeightsReader(back)
    assert reader.names() == SHAPES.keys()
    for name, shape in SHAPES.items():
        assert reader[name].shape == shape
        marked = marked_rows(name)
        for row, values in marked.items():
            assert np.array_equal(reader[name].read(row, row + 1).float().numpy().ravel(), values), (name, row)
        between = next(row for row in range(shape[0]) if row not in marked)
        assert not reader[name].read(between, between + 1).any()

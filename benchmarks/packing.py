"""Speed and fill of the packer, C++ against its Python twin: `python benchmarks/packing.py`.

Documents are drawn to look like Emu3's two stages: log-normal texts (some longer than a window), pictures of 4,162 ids
behind a caption, and for the long window clips that must be cut between frames. A picture leaves about 800 ids of
a short window: it is as full as there are short texts. Prints a table and writes JSON.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.config import load, run_program
from megatron_ext.data.packing import Spans, pack, pack_reference


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time the packer on drawn documents."""

    documents: int = 2_000_000
    """Documents for the C++ packer."""

    reference_documents: int = 100_000
    """Documents for the Python twin (and for the comparison of the two)."""

    alignment: int = 8
    """Documents take room up to a multiple of this."""

    output: str = "runs/benchmarks/packing.json"
    """Where the figures go."""


def draw_documents(count: int, picture_share: float, clip_share: float, seed: int) -> tuple[np.ndarray, Spans]:
    """Lengths and spans: texts, pictures of 64*64 codes after a caption, clips of 4 to 40 such frames."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, size=count, p=[1 - picture_share - clip_share, picture_share, clip_share])
    caption = rng.integers(16, 200, size=count)
    frames = np.where(kind == 2, rng.integers(4, 41, size=count), (kind == 1).astype(int))
    frame_ids = 64 * 65 + 1
    text = np.maximum(2, rng.lognormal(6.3, 1.1, size=count)).astype(np.int64)
    lengths = np.where(kind == 0, text, caption + 10 + frames * frame_ids)
    offsets = np.concatenate([[0], np.cumsum(frames)])
    document = np.repeat(np.arange(count), frames)
    number = np.arange(offsets[-1]) - offsets[document]
    start = caption[document] + np.where(number == 0, 1, 8 + number * frame_ids)
    end = caption[document] + 8 + (number + 1) * frame_ids
    return lengths, Spans(offsets, np.stack([start, end], axis=1).astype(np.int32))


def measure(seq_length: int, picture_share: float, clip_share: float, config: BenchmarkConfig) -> dict:
    lengths, spans = draw_documents(config.reference_documents, picture_share, clip_share, seed=0)
    start = time.perf_counter()
    reference = pack_reference(lengths, spans, seq_length, config.alignment)
    reference_s = time.perf_counter() - start
    native = pack(lengths, spans, seq_length, config.alignment)
    same = all(np.array_equal(native.arrays()[name], array) for name, array in reference.arrays().items())

    lengths, spans = draw_documents(config.documents, picture_share, clip_share, seed=1)
    start = time.perf_counter()
    index = pack(lengths, spans, seq_length, config.alignment)
    native_s = time.perf_counter() - start
    return {
        "seq_length": seq_length,
        "picture_percent": round(100 * picture_share),
        "alignment": config.alignment,
        "documents": config.documents,
        "cpp_docs_per_s": round(config.documents / native_s),
        "python_docs_per_s": round(config.reference_documents / reference_s),
        "fill_percent": round(100 * index.fill(seq_length), 3),
        "python_fill_percent": round(100 * reference.fill(seq_length), 3),
        "windows": len(index),
        "skipped": len(index.skipped_documents),
        "identical": same,
    }


def main(argv: list[str]) -> None:
    config = load(BenchmarkConfig, argv, prog="packing")
    rows = [
        measure(5_120, 0.5, 0.0, config),
        measure(5_120, 0.1, 0.0, config),
        measure(131_072, 0.5, 0.05, config),
    ]
    columns = [name for name in rows[0] if name not in ("documents", "alignment")]
    print("  ".join(columns))
    for row in rows:
        print("  ".join(f"{row[name]:>{len(name)},}" if name != "identical" else str(row[name]) for name in columns))
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    run_program(main)

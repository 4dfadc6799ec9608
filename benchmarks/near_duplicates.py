"""Clusters of near-duplicates and the held-out side of pictures at scale: `python benchmarks/near_duplicates.py`.

Draws perceptual hashes, of which a share are near an earlier one, and times their clusters on one core, in its own
seconds, which other programs hardly change. Then draws as many samples, and rows that show several of them, and times
their division into training and held-out ones. Writes JSON, which preprocess_data.py --plan reads.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.config import load, run_program
from megatron_ext.data.held_out import Media, References, held_out_keys
from megatron_ext.data.near_duplicates import PictureClusters, clusters


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time clusters of near-duplicates and the held-out split."""

    hashes: int = 10_000_000
    """Pictures."""

    near: float = 0.2
    """Share of them that are near-duplicates of others."""

    distance: int = 4
    """Bits in which near-duplicates differ at most, as preprocess_data.py's duplicate_distance."""

    pictures_of_a_row: int = 3
    """Pictures that a row shows; there are as many rows as fill all pictures once."""

    output: str = "runs/benchmarks/near_duplicates.json"
    """Where the figures go."""


def draw_hashes(config: BenchmarkConfig, rng: np.random.Generator) -> np.ndarray:
    """Random hashes, some of them moved by up to `distance` bits from others."""
    hashes_N = rng.integers(0, np.iinfo(np.uint64).max, config.hashes, dtype=np.uint64, endpoint=True)
    moved = np.flatnonzero(rng.random(config.hashes) < config.near)
    near_M = hashes_N[rng.integers(0, config.hashes, len(moved))]
    for _ in range(config.distance):
        near_M ^= np.uint64(1) << rng.integers(0, 64, len(moved), dtype=np.uint64)
    hashes_N[moved] = near_M
    return hashes_N


def main(argv: list[str]) -> None:
    """Run the program with the arguments after its name."""
    config = load(BenchmarkConfig, argv, prog="benchmarks/near_duplicates.py")
    rng = np.random.default_rng(0)
    hashes_N = draw_hashes(config, rng)
    started = time.process_time()
    clusters_N = clusters(hashes_N, config.distance)
    clustering = time.process_time() - started
    keys_N = np.sort(rng.integers(0, 1 << 63, config.hashes).astype(np.uint64))
    media = Media(keys_N, rng.permutation(keys_N), rng.random(config.hashes))
    rows = config.hashes // config.pictures_of_a_row
    references = References(
        rng.permutation(keys_N)[: rows * config.pictures_of_a_row], np.full(rows, config.pictures_of_a_row)
    )
    started = time.process_time()
    held_out = held_out_keys(media, references, PictureClusters(keys_N, clusters_N), 0.001)
    dividing = time.process_time() - started
    figures = {
        "hashes": config.hashes,
        "clusters": len(np.unique(clusters_N)),
        "cluster_seconds": clustering,
        "divide_seconds": dividing,
        "held_out_share": len(held_out) / config.hashes,
        "cluster_hashes_per_second": config.hashes / clustering,
    }
    print(f"{config.hashes:,} hashes, {figures['clusters']:,} clusters in {clustering:.1f} s")
    print(f"{rows:,} rows divided in {dividing:.1f} s, {figures['held_out_share']:.3%} of pictures held out")
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)

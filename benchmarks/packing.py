"""Packing at scale: `python benchmarks/packing.py`.

For each mix of documents (document_mixes.py): documents per second of the C++ packer on one core; its fill, which is
the share of the windows' positions that hold an id of a document, beside an upper bound that no packing of the same
pieces exceeds (packing_bound.py); the same with texts cut to fill; Megatron's GPTDataset on the same lengths: how fast
it builds its indexes, its fill, the share of pictures and frames that a window's end cuts. The packer and its Python
twin are compared on a smaller draw. `--large 100000000` then packs so many documents of the even mix of stage 1 and
says what memory that took. Prints tables and writes JSON.
"""

import json
import logging
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from document_mixes import MIXES, Drawn, Mix, draw, draw_lengths
from megatron_dataset import cut_spans, open_gpt_dataset, write_lengths
from packing_bound import bound_of_documents, bound_of_pieces

from megatron_ext.config import load, run_program
from megatron_ext.data.packing import SHORTEST_CUT, PackedIndex, PackingRules, Spans, pack, pack_reference


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time the packer on drawn documents."""

    documents: int = 4_000_000
    """Documents of each mix."""

    reference_documents: int = 50_000
    """Documents of each mix for the Python twin."""

    alignment: int = 1
    """Documents take room up to a multiple of this."""

    repeats: int = 3
    """The fastest of so many packings counts."""

    large: int = 0
    """Documents whose memory is measured after the mixes, in a process of its own; 0: none."""

    only_large: bool = False
    """Leave the mixes out."""

    output: str = "runs/benchmarks/packing.json"
    """Where the figures go."""


def timed_pack(lengths: np.ndarray, spans: Spans, rules: PackingRules, repeats: int) -> tuple[PackedIndex, float]:
    """The index, and the seconds of the fastest of some packings."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        index = pack(lengths, spans, rules)
        seconds.append(time.perf_counter() - started)
    return index, min(seconds)


def packer(drawn: Drawn, rules: PackingRules, repeats: int) -> dict:
    """Speed and fill of ours."""
    lengths = drawn.lengths
    index, seconds = timed_pack(lengths, drawn.spans(rules.spanned(lengths)), rules, repeats)
    free = bound_of_documents(lengths, drawn.spans(np.arange(len(lengths))), rules)
    # Texts that are cut to fill are cut at will. Other documents are cut as little as their length demands: the pieces
    # are then given, and only their places are chosen.
    bound = free if rules.shortest_cut else bound_of_pieces(index, rules)
    fill = index.fill(rules.seq_length)
    return {
        "million_docs_per_s": len(lengths) / seconds / 1e6,
        "fill_percent": 100 * fill,
        "bound_percent": 100 * bound,
        "points_below_bound": 100 * (bound - fill),
        "bound_if_cut_at_will_percent": 100 * free,
        "windows": len(index),
        "cut_percent": 100 * len(index.cut_documents(lengths)) / len(lengths),
        "skipped": len(index.skipped_documents),
    }


def megatron(drawn: Drawn, seq_length: int) -> dict:
    """GPTDataset on the same documents."""
    spans = drawn.spans(np.arange(len(drawn.lengths)))
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "documents"
        write_lengths(prefix, drawn.lengths)
        open_gpt_dataset(prefix, seq_length)  # the first one imports the C++ helpers
        started = time.perf_counter()
        dataset = open_gpt_dataset(prefix, seq_length)
        seconds = time.perf_counter() - started
        owners = np.repeat(spans.documents, np.diff(spans.offsets))
        cut = cut_spans(dataset, spans.bounds[:, 0], spans.bounds[:, 1], owners)
        # The last, incomplete window is dropped; all others are full.
        return {
            "million_docs_per_s": len(drawn.lengths) / seconds / 1e6,
            "windows": len(dataset),
            "fill_percent": 100.0,
            "spans_cut_percent": 100 * cut,
        }


def twin(mix: Mix, rules: PackingRules, count: int) -> dict:
    """Whether the Python twin gives the same index, and its speed."""
    drawn = draw(mix, count, seed=1)
    spans = drawn.spans(np.arange(count))
    started = time.perf_counter()
    reference = pack_reference(drawn.lengths, spans, rules).arrays()
    seconds = time.perf_counter() - started
    native = pack(drawn.lengths, spans, rules).arrays()
    identical = all(np.array_equal(native[name], array) for name, array in reference.items())
    return {"identical": identical, "million_docs_per_s": count / seconds / 1e6}


def measure(mix: Mix, config: BenchmarkConfig) -> dict:
    drawn = draw(mix, config.documents, seed=0)
    rules = PackingRules(seq_length=mix.seq_length, alignment=config.alignment)
    cutting = PackingRules(seq_length=mix.seq_length, alignment=config.alignment, shortest_cut=SHORTEST_CUT)
    ours = packer(drawn, rules, config.repeats)
    return {
        "mix": mix.name,
        "seq_length": mix.seq_length,
        "documents": config.documents,
        "picture_percent": 100 * mix.pictures,
        "clip_percent": 100 * mix.clips,
        "alignment": config.alignment,
        "ours": ours,
        "cutting_texts": packer(drawn, cutting, 1),
        "megatron": megatron(drawn, mix.seq_length),
        "python": twin(mix, rules, config.reference_documents),
        "python_cutting": twin(mix, cutting, config.reference_documents),
    }


def peak_bytes() -> int:
    """Largest memory this process has had; the peak that getrusage tells is inherited from the parent process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def measure_large(count: int, alignment: int) -> dict:
    """Memory of a whole process that draws and packs `count` documents, and what the packing added to it."""
    mix = next(mix for mix in MIXES if mix.name == "stage 1, even")
    rules = PackingRules(seq_length=mix.seq_length, alignment=alignment)
    before = peak_bytes()
    lengths, spans = draw_lengths(mix, count, seed=0)
    index, seconds = timed_pack(lengths, spans, rules, 1)
    peak = peak_bytes()
    return {
        "documents": count,
        "seconds": seconds,
        "million_docs_per_s": count / seconds / 1e6,
        "fill_percent": 100 * index.fill(mix.seq_length),
        "windows": len(index),
        "process_peak_gb": peak / 1e9,
        "lengths_and_packing_gb": (peak - before) / 1e9,
    }


def show(row: dict) -> str:
    """A row of the table, over several lines."""
    ours, cutting, theirs = row["ours"], row["cutting_texts"], row["megatron"]

    def fill(figures: dict) -> str:
        return (
            f"{figures['fill_percent']:7.3f}% full, {figures['points_below_bound']:.3f} points below the bound of "
            f"{figures['bound_percent']:.3f}%; {figures['cut_percent']:.2f}% of documents cut, no picture; "
            f"{figures['million_docs_per_s']:.1f} million documents/s"
        )

    return (
        f"{row['mix']} ({row['seq_length']:,} ids, {row['picture_percent']:.0f}% pictures, "
        f"{row['clip_percent']:.0f}% clips)\n"
        f"  ours      {fill(ours)}\n"
        f"  cut texts {fill(cutting)}\n"
        f"  Megatron  {theirs['fill_percent']:7.3f}% full, {theirs['spans_cut_percent']:.2f}% of pictures and frames "
        f"cut; {theirs['million_docs_per_s']:.1f} million documents/s\n"
        f"  if documents longer than a window were cut at will, the bound were "
        f"{ours['bound_if_cut_at_will_percent']:.3f}%; Python twin identical: {row['python']['identical']}, "
        f"cutting: {row['python_cutting']['identical']}"
    )


def main(argv: list[str]) -> None:
    config = load(BenchmarkConfig, argv, prog="packing")
    logging.disable(logging.WARNING)  # megatron-core tells every index that it builds
    if config.only_large:
        print(json.dumps(measure_large(config.large, config.alignment)), flush=True)
        return
    figures = {"rows": []}
    for mix in MIXES:
        figures["rows"].append(measure(mix, config))
        print(show(figures["rows"][-1]), flush=True)
    if config.large:
        options = ["--large", str(config.large), "--only_large", "true", "--alignment", str(config.alignment)]
        done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True)
        large = figures["large"] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{large['documents']:,} documents: {large['seconds']:.1f} s, "
            f"{large['million_docs_per_s']:.1f} million/s, "
            f"{large['lengths_and_packing_gb']:.2f} GB for lengths and packing, "
            f"{large['process_peak_gb']:.2f} GB with Python and its libraries"
        )
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run_program(main)

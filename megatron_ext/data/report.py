"""A dataset in words: the lines that preprocess_data.py and inspect_data.py print."""

import numpy as np

from megatron_ext.data.indexed import KINDS, DocumentDataset
from megatron_ext.data.packing import pack

_BAR_WIDTH = 40


def dataset_report(dataset: DocumentDataset) -> list[str]:
    """Counts and lengths by kind of document."""
    manifest = dataset.manifest
    kinds = dataset.sidecar.kinds
    lines = [
        f"{dataset.prefix}: {manifest.num_documents:,} documents, {manifest.num_ids:,} ids, "
        f"{manifest.visual_ids / manifest.num_ids:.1%} of them visual",
        f"  {'kind':<12}{'documents':>12}{'ids':>16}{'share':>8}{'shortest':>10}{'median':>10}{'longest':>10}",
    ]
    for number, kind in enumerate(KINDS):
        lengths = dataset.lengths[kinds == number]
        if len(lengths):
            total = int(lengths.sum(dtype=np.int64))
            lines.append(
                f"  {kind:<12}{len(lengths):>12,}{total:>16,}{total / manifest.num_ids:>8.1%}"
                f"{lengths.min():>10,}{int(np.median(lengths)):>10,}{lengths.max():>10,}"
            )
    return lines


def length_histogram(lengths: np.ndarray) -> list[str]:
    """Documents by length, in powers of two."""
    powers = np.floor(np.log2(lengths)).astype(int)
    counts = np.bincount(powers - powers.min())
    lines = ["  ids per document"]
    for power, count in enumerate(counts, powers.min()):
        bar = "#" * round(_BAR_WIDTH * count / counts.max())
        lines.append(f"  {2**power:>9,} to {2 ** (power + 1) - 1:>9,} {count:>12,} {bar}")
    return lines


def packing_report(dataset: DocumentDataset, seq_length: int, alignment: int) -> list[str]:
    """Windows, fill, cut and skipped documents of a packing."""
    index = pack(dataset.lengths, dataset.sidecar.spans, seq_length, alignment)
    cut = np.unique(index.piece_document[index.piece_length < dataset.lengths[index.piece_document]])
    lines = [
        f"  {len(index):,} windows of {seq_length:,} ids, {index.fill(seq_length):.2%} full; {len(cut):,} documents "
        f"cut, {len(index.skipped_documents):,} skipped (a picture or frame longer than a window)"
    ]
    return lines + [f"  skipped: {dataset.sidecar.key(document)}" for document in index.skipped_documents]

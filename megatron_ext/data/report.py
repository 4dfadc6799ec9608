"""Datasets, documents and the windows of a step in words: what preprocess_data.py and inspect_data.py print."""

from collections.abc import Iterable

import numpy as np

from megatron_ext.data.indexed import DocumentDataset
from megatron_ext.data.packing import PackingRules, pack
from megatron_ext.data.sidecar import KINDS
from megatron_ext.data.step_windows import DocumentInWindow, StepWindow
from megatron_ext.vocab import Image, Segment, Text, Vocabulary

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


def packing_report(dataset: DocumentDataset, rules: PackingRules) -> list[str]:
    """Windows, fill, cut and skipped documents of a packing."""
    index = pack(dataset.lengths, dataset.sidecar.spans, rules)
    lines = [
        f"  {len(index):,} windows of {rules.seq_length:,} ids, {index.fill(rules.seq_length):.2%} full; "
        f"{len(index.cut_documents(dataset.lengths)):,} documents cut, "
        f"{len(index.skipped_documents):,} skipped (a picture or frame longer than a window)"
    ]
    return lines + [f"  skipped: {dataset.sidecar.key(document)}" for document in index.skipped_documents]


def describe_segment(segment: Segment, vocabulary: Vocabulary, longest: int | None = None) -> str:
    """A segment in a line; of a text longer than `longest` characters its beginning and its end."""
    if isinstance(segment, Text):
        return f"text   {len(segment.ids):,} ids: {excerpt(vocabulary.text.decode(segment.ids), longest)!r}"
    if isinstance(segment, Image):
        rows, columns = segment.codes_HW.shape
        return f"image  {rows} x {columns} codes, {segment.codes_HW.min()}..{segment.codes_HW.max()}"
    frames, rows, columns = segment.codes_THW.shape
    return (
        f"video  {frames} frames of {rows} x {columns} codes, {segment.frame_rate_mhz / 1000:g} frames/s, "
        f"{segment.duration_ms / 1000:g} s"
    )


def excerpt(text: str, longest: int | None) -> str:
    """The text, or its beginning and end, where it has more than `longest` characters."""
    if longest is None or len(text) <= longest:
        return text
    half = max(1, longest // 2)
    return f"{text[:half]} [...] {text[-half:]}"


def describe_weights(weights: np.ndarray) -> str:
    """How many labels have which weight: `120 x 2, 256 x 1, 8 x 0`."""
    values, counts = np.unique(weights, return_counts=True)
    return ", ".join(f"{count:,} x {value}" for value, count in zip(values[::-1], counts[::-1], strict=True))


def describe_cut(document: DocumentInWindow) -> str:
    """Which ids of a document a window has; empty where it has all."""
    first, last = document.piece.start, document.piece.start + document.piece.length - 1
    return f"CUT: ids {first:,}..{last:,} of {document.document_length:,}" if document.is_cut else ""


def window_report(
    window: StepWindow,
    documents: Iterable[DocumentInWindow],
    dataset_name: str,
    vocabulary: Vocabulary,
    longest: int | None = None,
) -> list[str]:
    """A window of a step: where it goes, its documents and their segments by position, weights of labels, padding.

    `longest` is the number of characters of a text that are shown.
    """
    lines = [
        f"sample {window.sample:,}: data rank {window.data_rank}, microbatch {window.microbatch}, window "
        f"{window.window:,} of {dataset_name}, labels {describe_weights(window.weights_S)}"
    ]
    width = len(str(len(window.ids_S)))
    end = padding = 0
    for document in documents:
        piece = document.piece
        end, last = piece.end, piece.begin + piece.length
        padding += end - last
        facts = [
            f"{document.kind}, {piece.length:,} ids",
            f"document {piece.document:,}, key {document.key}",
            f"labels {describe_weights(window.weights_S[piece.begin : last])}",
            *filter(None, [describe_cut(document)]),
        ]
        lines.append(f"  {piece.begin:>{width}}..{last - 1:<{width}}  {'; '.join(facts)}")
        for part in document.segments:
            words = describe_segment(part.segment, vocabulary, longest)
            lines.append(f"    {part.begin:>{width}}..{part.end - 1:<{width}}  {words}")
    padding += len(window.ids_S) - end
    return [*lines, f"  padding: {padding:,} of {len(window.ids_S):,} ids"]

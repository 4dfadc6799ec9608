"""Megatron's GPTDataset, as the benchmarks compare with it: concatenated documents, cut into windows."""

from pathlib import Path

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, _IndexWriter
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers import MegatronTokenizer


def write_lengths(prefix: Path, lengths: np.ndarray) -> None:
    """A .bin/.idx pair of documents of these lengths; the .bin has size and no content."""
    with _IndexWriter(f"{prefix}.idx", np.int32) as writer:
        writer.write(lengths, None, np.arange(len(lengths) + 1))
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(4 * int(lengths.sum(dtype=np.int64)))


def open_gpt_dataset(prefix: Path, seq_length: int) -> GPTDataset:
    """One epoch of all documents, shuffled; the indexes are built and not cached."""
    indexed = IndexedDataset(str(prefix), mmap=True)
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=seq_length,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=MegatronTokenizer.from_pretrained(metadata_path={"library": "null"}, vocab_size=184_622),
    )
    documents = np.arange(len(indexed), dtype=np.int32)
    return GPTDataset(indexed, str(prefix), documents, None, Split.train, config)


def cut_spans(dataset: GPTDataset, starts: np.ndarray, ends: np.ndarray, documents: np.ndarray) -> float:
    """Share of the spans [start, end) in their documents that have a window's boundary inside."""
    lengths = dataset.dataset.sequence_lengths.astype(np.int64)
    order = dataset.document_index
    begin = np.empty(len(lengths), np.int64)  # of each document in the concatenation
    begin[order] = np.cumsum(lengths[order]) - lengths[order]
    seq_length = dataset.config.sequence_length
    first, last = begin[documents] + starts, begin[documents] + ends - 1
    return float((first // seq_length != last // seq_length).mean())

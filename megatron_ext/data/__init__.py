"""Documents on disk, packed into windows, in the order of a run, as batches."""

from megatron_ext.data.batch import Batch, collate, context_indices, slice_for_context
from megatron_ext.data.indexed import DocumentDataset
from megatron_ext.data.loader import BatchTopology, Data, Loader, build_data
from megatron_ext.data.manifest import Manifest
from megatron_ext.data.order import Blend, Permutation
from megatron_ext.data.packing import PackedIndex, PackingRules, Spans, pack, pack_reference
from megatron_ext.data.sidecar import KINDS, document_kind
from megatron_ext.data.synthetic import RandomDocuments
from megatron_ext.data.windows import PackedDataset, Window
from megatron_ext.data.writer import DocumentWriter

__all__ = [
    "KINDS",
    "Batch",
    "BatchTopology",
    "Blend",
    "Data",
    "DocumentDataset",
    "DocumentWriter",
    "Loader",
    "Manifest",
    "PackedDataset",
    "PackedIndex",
    "PackingRules",
    "Permutation",
    "RandomDocuments",
    "Spans",
    "Window",
    "build_data",
    "collate",
    "context_indices",
    "document_kind",
    "pack",
    "pack_reference",
    "slice_for_context",
]

"""What an optimizer step trains on: its windows as the data ranks get them, and what is in each.

S = seq_length.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megatron_ext.data.indexed import DocumentDataset
from megatron_ext.data.loader import Loader
from megatron_ext.data.sidecar import KINDS
from megatron_ext.data.windows import PackedDataset, Piece
from megatron_ext.vocab import Segment, Text, Video, Vocabulary, decode_document, encode_block_start


@dataclass(frozen=True)
class DataRank:
    """A data rank whose context ranks are taken together: it gets whole rows."""

    data_parallel_rank: int
    data_parallel_size: int
    context_parallel_rank: int = 0
    context_parallel_size: int = 1


@dataclass(frozen=True, kw_only=True)
class StepWindow:
    """One window of a step, from the batch that the training step is given."""

    sample: int
    """Its number in the run, from 0."""
    data_rank: int
    microbatch: int
    dataset: int
    """Index of its dataset in the blend."""
    window: int
    """Its number in the dataset."""
    ids_S: np.ndarray
    labels_S: np.ndarray
    weights_S: np.ndarray
    """Integer weight of each label; 0 where there is none."""


@dataclass(frozen=True, kw_only=True)
class SegmentInWindow:
    """A text, picture or clip, as far as it is in the window."""

    begin: int
    """Its first position in the window."""
    end: int
    """One past its last."""
    segment: Segment
    """The ids, or the frames of a clip, that are here; a picture is never cut."""


@dataclass(frozen=True, kw_only=True)
class DocumentInWindow:
    """A piece of a window and the document it belongs to."""

    piece: Piece
    key: str
    kind: str
    document_length: int
    segments: tuple[SegmentInWindow, ...]

    @property
    def is_cut(self) -> bool:
        """Whether a part of the document is elsewhere."""
        return self.piece.length < self.document_length


def step_windows(
    loader: Loader, consumed_samples: int, data_parallel_size: int, weigh: Callable[[Tensor, Tensor], Tensor]
) -> list[StepWindow]:
    """The windows of the global batch after `consumed_samples` samples of the run, in the order of samples.

    Args:
        loader: of the run.
        consumed_samples: by the steps before.
        data_parallel_size: ranks that share the windows.
        weigh: weights of (labels_BT, label_mask_BT), see objectives.
    """
    windows = []
    for rank in range(data_parallel_size):
        view = loader.seen_by(DataRank(rank, data_parallel_size))
        batches = zip(view.places(consumed_samples), view.microbatches(consumed_samples), strict=True)
        for microbatch, (places, batch) in enumerate(batches):
            rows = [batch.tokens_BT, batch.labels_BT, weigh(batch.labels_BT, batch.label_mask_BT)]
            ids_mS, labels_mS, weights_mS = (row.reshape(batch.num_windows, -1).numpy() for row in rows)
            first = consumed_samples + (microbatch * data_parallel_size + rank) * batch.num_windows
            windows += [
                StepWindow(
                    sample=first + j,
                    data_rank=rank,
                    microbatch=microbatch,
                    dataset=dataset,
                    window=window,
                    ids_S=ids_mS[j],
                    labels_S=labels_mS[j],
                    weights_S=weights_mS[j],
                )  # fmt: skip
                for j, (dataset, window) in enumerate(places)
            ]
    return sorted(windows, key=lambda window: window.sample)


def documents_in_window(packed: PackedDataset, window: int) -> Iterator[DocumentInWindow]:
    """The documents of a window, in order, with what of them is there."""
    documents = packed.documents
    for piece in packed.pieces(window):
        yield DocumentInWindow(
            piece=piece,
            key=documents.sidecar.key(piece.document),
            kind=KINDS[documents.sidecar.kinds[piece.document]],
            document_length=int(documents.lengths[piece.document]),
            segments=tuple(_segments_of(piece, documents)),
        )


def segment_extents(segments: Sequence[Segment], vocabulary: Vocabulary) -> Iterator[tuple[int, int, Segment]]:
    """[start, stop) of each segment among the ids of the document that they make."""
    start = 1  # BOS is before the first
    for segment in segments:
        if isinstance(segment, Text):
            length = len(segment.ids)
        else:
            grid = segment.grid
            length = len(encode_block_start(grid, vocabulary)) + grid.body_length(vocabulary.block)
        yield start, start + length, segment
        start += length


def _segments_of(piece: Piece, documents: DocumentDataset) -> Iterator[SegmentInWindow]:
    vocabulary = documents.vocabulary
    segments = decode_document(documents.ids(piece.document), vocabulary)
    shift = piece.begin - piece.start  # from positions in the document to positions in the window
    for start, stop, segment in segment_extents(segments, vocabulary):
        low, high = max(start, piece.start), min(stop, piece.start + piece.length)
        if low < high:
            if isinstance(segment, Text):
                segment = Text(segment.ids[low - start : high - start])
            elif isinstance(segment, Video):
                segment = _frames_between(segment, low - start, high - start, vocabulary)
            yield SegmentInWindow(begin=low + shift, end=high + shift, segment=segment)


def _frames_between(clip: Video, low: int, high: int, vocabulary: Vocabulary) -> Video:
    """The frames of a clip among the ids [low, high) of its block: cuts are between frames, so each is here or not."""
    frame = clip.grid.frame_length(vocabulary.block)
    head = len(encode_block_start(clip.grid, vocabulary))
    first, last = (max(position - head, 0) // frame for position in (low, high))
    return Video(clip.codes_THW[first:last], clip.frame_rate_mhz, clip.duration_ms)

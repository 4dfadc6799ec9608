"""Documents as ids, many at a time: what workers make and a writer appends.

Shape suffixes: N ids; D documents; M spans.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.data.sidecar import KINDS, document_kind
from megatron_ext.vocab import Image, Segment, Text, Video, Vocabulary, encode_document, segment_spans


@dataclass(frozen=True)
class Draft:
    """A document whose texts are still strings."""

    key: str
    """Of its source."""
    parts: tuple[str | Image | Video, ...]
    """At least one; no empty string, no two strings in a row."""


@dataclass(frozen=True, kw_only=True)
class EncodedDocuments:
    """D documents, end to end."""

    ids_N: np.ndarray
    """int32."""
    lengths_D: np.ndarray
    """int32: ids of each."""
    kinds_D: np.ndarray
    """uint8: index into KINDS."""
    keys: tuple[str, ...]
    """Source of each."""
    span_counts_D: np.ndarray
    """int64: unbreakable spans of each."""
    bounds_M2: np.ndarray
    """int32: the spans, in positions of their document."""
    visual_ids: int
    """How many of the ids are visual."""

    def __len__(self) -> int:
        return len(self.lengths_D)


def encode_segments(documents: Sequence[tuple[str, Sequence[Segment]]], vocabulary: Vocabulary) -> EncodedDocuments:
    """Documents given as (source key, segments).

    Raises:
        InputError: segments that are no document; the message names the key.
    """
    ids, spans = [], []
    for key, segments in documents:
        try:
            ids.append(encode_document(segments, vocabulary))
        except InputError as error:
            raise InputError(f"{key}: {error}") from None
        spans.append(segment_spans(segments, vocabulary))
    media = [segment for _, segments in documents for segment in segments if not isinstance(segment, Text)]
    return EncodedDocuments(
        ids_N=np.concatenate([np.empty(0, np.int32), *ids]),
        lengths_D=np.array([len(each) for each in ids], dtype=np.int32),
        kinds_D=np.array([KINDS.index(document_kind(segments)) for _, segments in documents], dtype=np.uint8),
        keys=tuple(key for key, _ in documents),
        span_counts_D=np.array([len(bounds) for bounds in spans], dtype=np.int64),
        bounds_M2=np.concatenate([np.empty((0, 2), np.int32), *spans]).astype(np.int32),
        visual_ids=sum(part.grid.codes for part in media),
    )


def encode_drafts(drafts: Sequence[Draft], vocabulary: Vocabulary) -> EncodedDocuments:
    """The documents of drafts; all their texts go through the text tokenizer in one batch."""
    texts = [part for draft in drafts for part in draft.parts if isinstance(part, str)]
    ids_N, ends_T = vocabulary.text.encode_arrays(texts)
    if all(len(draft.parts) == 1 and isinstance(draft.parts[0], str) for draft in drafts):
        return _only_texts(ids_N, ends_T, tuple(draft.key for draft in drafts), vocabulary)
    pieces = iter(np.split(ids_N, ends_T[:-1]))
    documents = [
        (draft.key, [Text(next(pieces)) if isinstance(part, str) else part for part in draft.parts]) for draft in drafts
    ]
    return encode_segments(documents, vocabulary)


def _only_texts(
    text_N: np.ndarray, ends_D: np.ndarray, keys: tuple[str, ...], vocabulary: Vocabulary
) -> EncodedDocuments:
    """What `encode_segments` gives for documents of one text each, without a step of Python per document."""
    documents = len(ends_D)
    lengths_D = np.diff(ends_D, prepend=0)
    is_text_N = vocabulary.is_text(text_N)
    if not is_text_N.all() or not lengths_D.all():
        wrong = int(is_text_N.argmin()) if not is_text_N.all() else int(ends_D[lengths_D.argmin()])
        raise InputError(f"{keys[int(np.searchsorted(ends_D, wrong, side='right'))]}: the text tokenizer gave no text")
    ids_N = np.empty(len(text_N) + 2 * documents, dtype=np.int32)
    last_D = ends_D + 2 * np.arange(documents) + 1
    first_D = last_D - lengths_D - 1
    inside_N = np.ones(len(ids_N), dtype=bool)
    inside_N[first_D] = inside_N[last_D] = False
    ids_N[inside_N] = text_N
    ids_N[first_D], ids_N[last_D] = vocabulary.layout.bos, vocabulary.layout.eos
    return EncodedDocuments(
        ids_N=ids_N,
        lengths_D=(lengths_D + 2).astype(np.int32),
        kinds_D=np.full(documents, KINDS.index("text"), dtype=np.uint8),
        keys=keys,
        span_counts_D=np.zeros(documents, dtype=np.int64),
        bounds_M2=np.empty((0, 2), dtype=np.int32),
        visual_ids=0,
    )

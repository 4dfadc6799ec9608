"""Writes a dataset (see indexed.py) document by document."""

import array
import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.data.encoded import EncodedDocuments, encode_segments
from megatron_ext.data.index_file import write_index
from megatron_ext.data.manifest import FORMAT_VERSION, Manifest, discard, file_facts, partial_path, publish
from megatron_ext.data.sidecar import KINDS, SidecarBuilder, write_sidecar
from megatron_ext.files import writing
from megatron_ext.vocab import Segment, Vocabulary


class DocumentWriter:
    """Writes one dataset; `with` removes the unfinished files unless it was published.

    Memory: 21 bytes per document, its key, and 8 bytes per unbreakable span.

    Args:
        prefix: path without suffix.
        vocabulary: of the ids.
        vision_tokenizer: identity of what made the visual codes; None where there are none.
    """

    def __init__(self, prefix: str | Path, vocabulary: Vocabulary, vision_tokenizer: str | None):
        self.prefix = Path(prefix)
        self.vocabulary = vocabulary
        self.vision_tokenizer = vision_tokenizer
        self._documents_K = np.zeros(len(KINDS), dtype=np.int64)
        self._ids_K = np.zeros(len(KINDS), dtype=np.int64)
        self._visual_ids = 0
        self._lengths = array.array("i")
        self._sidecar = SidecarBuilder()
        self._digest = hashlib.sha256()
        with writing(self.prefix, "output_prefix"):
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._file = partial_path(self.prefix, ".bin").open("wb")

    def __enter__(self) -> "DocumentWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # on a full disk the last bytes have no room either
            self._file.close()
        discard(self.prefix)

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, segments: Sequence[Segment], key: str) -> int:
        """Append the document made of `segments` that came from source `key`; returns its number of ids.

        Raises:
            InputError: the segments are no document; the message names the key.
        """
        documents = encode_segments([(key, segments)], self.vocabulary)
        self.add_encoded(documents)
        return len(documents.ids_N)

    def add_encoded(self, documents: EncodedDocuments) -> None:
        """Append documents.

        Raises:
            InputError: the disk is full.
        """
        content = np.ascontiguousarray(documents.ids_N, dtype=np.int32)
        with writing(self.prefix, "output_prefix"):
            self._file.write(content)
        self._digest.update(content)
        self._lengths.frombytes(documents.lengths_D.astype(np.int32).tobytes())
        self._sidecar.add(documents.kinds_D, documents.keys, documents.span_counts_D, documents.bounds_M2)
        np.add.at(self._documents_K, documents.kinds_D, 1)
        np.add.at(self._ids_K, documents.kinds_D, documents.lengths_D)
        self._visual_ids += documents.visual_ids

    def prepare(self) -> Manifest:
        """Complete the files under their temporary names: `publish([prefix])` renames them.

        Raises:
            InputError: a file cannot be written.
        """
        with writing(self.prefix, "output_prefix"):
            self._file.close()
            lengths = np.frombuffer(self._lengths, dtype=np.int32)
            write_index(partial_path(self.prefix, ".idx"), [lengths])
            sidecar = write_sidecar(partial_path(self.prefix, ".spans.npz"), [self._sidecar.build()])
            self.vocabulary.save(partial_path(self.prefix, ".vocabulary"))
            ids = {"bytes": lengths.sum(dtype=np.int64).item() * 4, "sha256": self._digest.hexdigest()}
            facts = {suffix: file_facts(partial_path(self.prefix, suffix)) for suffix in (".idx", ".spans.npz")}
            manifest = Manifest(
                format_version=FORMAT_VERSION,
                vocabulary=self.vocabulary.identity,
                vision_tokenizer=self.vision_tokenizer,
                documents=dict(zip(KINDS, self._documents_K.tolist(), strict=True)),
                ids=dict(zip(KINDS, self._ids_K.tolist(), strict=True)),
                visual_ids=self._visual_ids,
                longest=int(lengths.max(initial=0)),
                files={".bin": ids, **facts},
                sidecar=sidecar,
            )
            manifest.save(partial_path(self.prefix, ".manifest.json"))
        return manifest

    def commit(self) -> Manifest:
        """Complete the dataset; an older one of the same prefix is replaced.

        Raises:
            InputError: no document was added, or a file cannot be written.
        """
        if not len(self):
            raise InputError(f"{self.prefix} would be empty: no input gave a document")
        manifest = self.prepare()
        with writing(self.prefix, "output_prefix"):
            publish([self.prefix])
        return manifest

"""Documents on disk: megatron-core's .bin/.idx, a sidecar and a manifest beside it.

    PREFIX.bin, PREFIX.idx   the documents' ids as megatron-core's IndexedDataset: int32, one sequence per document
    PREFIX.spans.npz         the sidecar: kind, source key and unbreakable spans of each document
    PREFIX.vocabulary/       the vocabulary the ids belong to (Vocabulary.save)
    PREFIX.manifest.json     format version, vocabulary id, vision-tokenizer id, counts, sizes, hashes, sidecar digest

Written under temporary names and renamed when complete, the .idx last: where there is an .idx, everything is there.
The same documents give the same bytes.
"""

import logging
from functools import cached_property
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ext.config import InputError
from megatron_ext.data.encoded import encode_segments
from megatron_ext.data.manifest import Manifest, dataset_path, file_facts
from megatron_ext.data.object_store import RemoteDataset, is_remote
from megatron_ext.data.sidecar import Sidecar, SidecarBuilder, write_sidecar
from megatron_ext.files import check_open_files, replacing
from megatron_ext.vocab import Vocabulary, decode_document

FILES_OPEN = 3
"""Files that a dataset keeps open, those that Python's mmap duplicates among them."""

FILES_READ = 8
"""More than are open at once while manifest, sidecar and packing index are read."""

_log = logging.getLogger(__name__)


class DocumentDataset:
    """Reads a dataset, memory-mapped or from an object store; `len` is the number of documents.

    Args:
        prefix: path without suffix, or s3://BUCKET/PATH.
        vocabulary: of the ids.
        cache_dir: local folder for what is copied from an object store.

    Raises:
        InputError: a file is missing or not the manifest's, or the dataset was made with another vocabulary.
    """

    def __init__(self, prefix: str | Path, vocabulary: Vocabulary, cache_dir: str | None = None):
        self.name = str(prefix)
        check_open_files(FILES_OPEN + FILES_READ, self.name)
        remote = RemoteDataset(str(prefix), cache_dir) if is_remote(prefix) else None
        self.prefix = remote.local_prefix if remote else Path(prefix)
        self.vocabulary = vocabulary
        self.manifest = Manifest.read(dataset_path(self.prefix, ".manifest.json"))
        if self.manifest.vocabulary != vocabulary.identity:
            raise InputError(
                f"{self.prefix} was made with vocabulary {self.manifest.vocabulary}, this is {vocabulary.identity}: "
                "set section vocab as it was at preprocessing, or preprocess again"
            )
        for suffix in (".bin", ".idx"):
            size = remote.size(suffix) if remote else _size(dataset_path(self.prefix, suffix))
            _check_size(self.name + suffix, size, int(self.manifest.files[suffix]["bytes"]))
        self._ids = remote.open_ids() if remote else IndexedDataset(str(self.prefix), mmap=True)

    @classmethod
    def open(cls, prefix: str | Path) -> "DocumentDataset":
        """The dataset with the vocabulary saved beside it."""
        Manifest.read(dataset_path(Path(prefix), ".manifest.json"))  # a wrong prefix is best named by its manifest
        return cls(prefix, Vocabulary.from_folder(dataset_path(Path(prefix), ".vocabulary")))

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def lengths(self) -> np.ndarray:
        """int32 [N]: ids of each document."""
        return self._ids.sequence_lengths

    def ids(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """int32 ids of a document, or `length` of them from `start`."""
        return self._ids.get(document, start, length)

    def check_files(self) -> dict[str, bool]:
        """Whether each file still has the manifest's size and sha256 (a rebuilt sidecar has other keys, so not)."""
        paths = {suffix: dataset_path(self.prefix, suffix) for suffix in self.manifest.files}
        return {
            suffix: path.exists() and file_facts(path) == self.manifest.files[suffix] for suffix, path in paths.items()
        }

    @cached_property
    def sidecar(self) -> Sidecar:
        """Kinds, keys and spans; rebuilt from the ids and written where it is absent (keys: `NAME#NUMBER`)."""
        path = dataset_path(self.prefix, ".spans.npz")
        if not path.exists():
            self._rebuild_sidecar(path)
        sidecar = Sidecar.read(path)
        if sidecar.digest != self.manifest.sidecar:
            raise InputError(f"{path} does not describe these documents: remove it, it will be rebuilt")
        return sidecar

    def _rebuild_sidecar(self, path: Path) -> None:
        _log.warning("%s is absent: rebuilding it from %d documents", path, len(self))
        builder = SidecarBuilder()
        for document in range(len(self)):
            key = f"{self.prefix.name}#{document}"
            try:
                found = encode_segments([(key, decode_document(self.ids(document), self.vocabulary))], self.vocabulary)
            except InputError as error:
                raise InputError(f"document {document} of {self.prefix}: {error}") from None
            builder.add(found.kinds_D, found.keys, found.span_counts_D, found.bounds_M2)
        with replacing(path, is_shared=True) as temporary:  # several ranks may be doing this, each with the same result
            if write_sidecar(temporary, [builder.build()]) != self.manifest.sidecar:
                raise InputError(
                    f"{self.prefix}.bin holds other documents than its manifest says: preprocess the data again"
                )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def _check_size(path: str, found: int | None, size: int) -> None:
    if found != size:
        state = "is missing" if found is None else f"has {found} bytes, its manifest says {size}"
        raise InputError(f"{path} {state}: preprocess the data again")

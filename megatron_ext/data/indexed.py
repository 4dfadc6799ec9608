"""Documents on disk: megatron-core's .bin/.idx, a sidecar and a manifest beside it.

    PREFIX.bin, PREFIX.idx   the documents' ids as megatron-core's IndexedDataset: int32, one sequence per document
    PREFIX.spans.npz         the sidecar: kind, source key and unbreakable spans of each document
    PREFIX.vocabulary/       the vocabulary the ids belong to (Vocabulary.save)
    PREFIX.manifest.json     format version, vocabulary id, vision-tokenizer id, counts, sizes, hashes, sidecar digest

Written under temporary names and renamed when complete, the .idx last: where there is an .idx, everything is there.
The same documents give the same bytes.
"""

import array
import contextlib
import hashlib
import json
import logging
import os
import shutil
import struct
import tempfile
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_ext.config import InputError, writing
from megatron_ext.data.npz import map_npz
from megatron_ext.data.object_store import RemoteDataset, is_remote
from megatron_ext.data.packing import Spans
from megatron_ext.vocab import Segment, Text, Video, Vocabulary, decode_document, encode_document, spans

FORMAT_VERSION = 1

KINDS = ("text", "image", "video", "interleaved")
"""Kinds of documents: only text; one picture; one clip (each with or without text); several of them."""

_PARTIAL = ".partial"
_log = logging.getLogger(__name__)


def document_kind(segments: Sequence[Segment]) -> str:
    """Which of KINDS a document is."""
    media = [segment for segment in segments if not isinstance(segment, Text)]
    if not media:
        return "text"
    if len(media) > 1:
        return "interleaved"
    return "video" if isinstance(media[0], Video) else "image"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset says about itself."""

    format_version: int
    vocabulary: str
    """Identity of the vocabulary."""
    vision_tokenizer: str | None
    """Identity of the vision tokenizer; None where there is no picture."""
    documents: Mapping[str, int]
    """Documents of each kind."""
    ids: Mapping[str, int]
    """Ids of the documents of each kind."""
    visual_ids: int
    """How many of all ids are visual."""
    longest: int
    """Ids of the longest document."""
    files: Mapping[str, Mapping[str, int | str]]
    """Bytes and sha256 of each file, by suffix."""
    sidecar: str
    """Digest of the sidecar."""

    @property
    def num_documents(self) -> int:
        return sum(self.documents.values())

    @property
    def num_ids(self) -> int:
        return sum(self.ids.values())

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Raises InputError: no manifest, or one this version cannot read."""
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            raise InputError(f"{path} is missing: give the prefix of a dataset that preprocess_data.py wrote") from None
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}") from None
        if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
            raise InputError(f"{path} is not of format version {FORMAT_VERSION}: preprocess the data again")
        try:
            return cls(**content)
        except TypeError as error:
            raise InputError(f"{path} is damaged ({error}): preprocess the data again") from None


@dataclass(frozen=True)
class Sidecar:
    """Kind, source key and unbreakable spans of N documents."""

    kinds: np.ndarray  # uint8 [N]: index into KINDS
    key_offsets: np.ndarray  # int64 [N + 1] into key_bytes
    key_bytes: np.ndarray  # uint8: UTF-8 of all keys
    span_offsets: np.ndarray  # int64 [N + 1] into span_bounds
    span_bounds: np.ndarray  # int32 [M, 2]

    def __len__(self) -> int:
        return len(self.kinds)

    def key(self, document: int) -> str:
        return bytes(self.key_bytes[self.key_offsets[document] : self.key_offsets[document + 1]]).decode()

    @property
    def spans(self) -> Spans:
        return self.spans_of(np.arange(len(self)))

    def spans_of(self, documents: np.ndarray) -> Spans:
        """The spans of some documents, whose numbers ascend."""
        return Spans.select(self.span_offsets, self.span_bounds, documents)

    @property
    def digest(self) -> str:
        """Sha256 of kinds and spans; keys are left out, because they cannot be rebuilt from the ids."""
        digest = hashlib.sha256()
        for part in (self.kinds, self.span_offsets, self.span_bounds):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part))
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        with path.open("wb") as file:  # np.savez stamps no time into the archive: the same content, the same bytes
            np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def read(cls, path: Path) -> "Sidecar":
        """Memory-mapped. Raises InputError: the file is no sidecar."""
        try:
            arrays = map_npz(path)
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, struct.error, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is damaged ({error}): remove it, it will be rebuilt") from None


class _SidecarBuilder:
    """Grows a sidecar document by document, compactly."""

    def __init__(self) -> None:
        self.kinds = array.array("B")
        self.key_ends = array.array("q", [0])
        self.keys = bytearray()
        self.span_ends = array.array("q", [0])
        self.bounds = array.array("i")

    def add(self, kind: str, key: str, bounds: np.ndarray) -> None:
        self.kinds.append(KINDS.index(kind))
        self.keys += key.encode()
        self.key_ends.append(len(self.keys))
        self.bounds.frombytes(bounds.astype(np.int32).tobytes())
        self.span_ends.append(len(self.bounds) // 2)

    def build(self) -> Sidecar:
        return Sidecar(
            kinds=np.array(self.kinds, dtype=np.uint8),
            key_offsets=np.array(self.key_ends, dtype=np.int64),
            key_bytes=np.frombuffer(bytes(self.keys), dtype=np.uint8),
            span_offsets=np.array(self.span_ends, dtype=np.int64),
            span_bounds=np.array(self.bounds, dtype=np.int32).reshape(-1, 2),
        )


class DocumentWriter:
    """Writes one dataset; `with` removes the unfinished files unless `commit` was called.

    Args:
        prefix: path without suffix.
        vocabulary: of the ids.
        vision_tokenizer: identity of what made the visual codes; None where there are none.
    """

    def __init__(self, prefix: str | Path, vocabulary: Vocabulary, vision_tokenizer: str | None):
        self.prefix = Path(prefix)
        self.vocabulary = vocabulary
        self.vision_tokenizer = vision_tokenizer
        self.documents: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self.ids: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self.visual_ids = 0
        self.longest = 0
        self._sidecar = _SidecarBuilder()
        with writing(self.prefix, "output_prefix"):
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._builder = IndexedDatasetBuilder(str(self._partial(".bin")), dtype=np.int32)

    def __enter__(self) -> "DocumentWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # on a full disk the last bytes have no room either
            self._builder.data_file.close()
        for suffix in (".bin", ".idx", ".spans.npz", ".manifest.json"):
            self._partial(suffix).unlink(missing_ok=True)
        shutil.rmtree(self._partial(".vocabulary"), ignore_errors=True)

    def __len__(self) -> int:
        return self.documents.total()

    def add(self, segments: Sequence[Segment], key: str) -> int:
        """Append the document made of `segments` that came from source `key`; returns its number of ids.

        Raises:
            InputError: the segments are no document; the message names the key.
        """
        try:
            ids = encode_document(segments, self.vocabulary)
        except InputError as error:
            raise InputError(f"{key}: {error}") from None
        kind = document_kind(segments)
        with writing(self.prefix, "output_prefix"):
            self._builder.add_document(ids, [len(ids)])
        self._sidecar.add(kind, key, spans(ids, self.vocabulary))
        self.documents[kind] += 1
        self.ids[kind] += len(ids)
        self.visual_ids += int(self.vocabulary.layout.is_visual(ids).sum())
        self.longest = max(self.longest, len(ids))
        return len(ids)

    def commit(self) -> Manifest:
        """Complete the dataset; an older one of the same prefix is replaced.

        Raises:
            InputError: no document was added, or a file cannot be written.
        """
        if not len(self):
            raise InputError(f"{self.prefix} would be empty: no input gave a document")
        with writing(self.prefix, "output_prefix"):
            self._builder.finalize(str(self._partial(".idx")))
            sidecar = self._sidecar.build()
            sidecar.save(self._partial(".spans.npz"))
            self.vocabulary.save(self._partial(".vocabulary"))
            manifest = Manifest(
                format_version=FORMAT_VERSION,
                vocabulary=self.vocabulary.identity,
                vision_tokenizer=self.vision_tokenizer,
                documents=dict(self.documents),
                ids=dict(self.ids),
                visual_ids=self.visual_ids,
                longest=self.longest,
                files={suffix: _file_facts(self._partial(suffix)) for suffix in (".bin", ".idx", ".spans.npz")},
                sidecar=sidecar.digest,
            )
            manifest.save(self._partial(".manifest.json"))
            # Without its .idx the older dataset is no dataset: no moment shows a mixture of the two as a whole.
            _path(self.prefix, ".idx").unlink(missing_ok=True)
            shutil.rmtree(_path(self.prefix, ".vocabulary"), ignore_errors=True)
            for suffix in (".vocabulary", ".bin", ".spans.npz", ".manifest.json", ".idx"):
                os.replace(self._partial(suffix), _path(self.prefix, suffix))
        return manifest

    def _partial(self, suffix: str) -> Path:
        return _path(self.prefix, suffix + _PARTIAL)


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
        remote = RemoteDataset(str(prefix), cache_dir) if is_remote(prefix) else None
        self.prefix = remote.local_prefix if remote else Path(prefix)
        self.vocabulary = vocabulary
        self.manifest = Manifest.read(_path(self.prefix, ".manifest.json"))
        if self.manifest.vocabulary != vocabulary.identity:
            raise InputError(
                f"{self.prefix} was made with vocabulary {self.manifest.vocabulary}, this is {vocabulary.identity}: "
                "set section vocab as it was at preprocessing, or preprocess again"
            )
        for suffix in (".bin", ".idx"):
            size = remote.size(suffix) if remote else _size(_path(self.prefix, suffix))
            _check_size(self.name + suffix, size, int(self.manifest.files[suffix]["bytes"]))
        self._ids = remote.open_ids() if remote else IndexedDataset(str(self.prefix), mmap=True)

    @classmethod
    def open(cls, prefix: str | Path) -> "DocumentDataset":
        """The dataset with the vocabulary saved beside it."""
        Manifest.read(_path(Path(prefix), ".manifest.json"))  # a wrong prefix is best named by its manifest
        return cls(prefix, Vocabulary.from_folder(_path(Path(prefix), ".vocabulary")))

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
        paths = {suffix: _path(self.prefix, suffix) for suffix in self.manifest.files}
        return {
            suffix: path.exists() and _file_facts(path) == self.manifest.files[suffix] for suffix, path in paths.items()
        }

    @cached_property
    def sidecar(self) -> Sidecar:
        """Kinds, keys and spans; rebuilt from the ids and written where it is absent (keys: `NAME#NUMBER`)."""
        path = _path(self.prefix, ".spans.npz")
        if not path.exists():
            self._rebuild_sidecar(path)
        sidecar = Sidecar.read(path)
        if sidecar.digest != self.manifest.sidecar:
            raise InputError(f"{path} does not describe these documents: remove it, it will be rebuilt")
        return sidecar

    def _rebuild_sidecar(self, path: Path) -> None:
        _log.warning("%s is absent: rebuilding it from %d documents", path, len(self))
        builder = _SidecarBuilder()
        for document in range(len(self)):
            ids = self.ids(document)
            key = f"{self.prefix.name}#{document}"
            try:
                builder.add(document_kind(decode_document(ids, self.vocabulary)), key, spans(ids, self.vocabulary))
            except InputError as error:
                raise InputError(f"document {document} of {self.prefix}: {error}") from None
        sidecar = builder.build()
        if sidecar.digest != self.manifest.sidecar:
            raise InputError(
                f"{self.prefix}.bin holds other documents than its manifest says: preprocess the data again"
            )
        # A name of its own: several ranks may be doing this at once, and each result is the same.
        handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=_PARTIAL, dir=path.parent)
        os.close(handle)
        sidecar.save(Path(temporary))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)


def _path(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def _check_size(path: str, found: int | None, size: int) -> None:
    if found != size:
        state = "is missing" if found is None else f"has {found} bytes, its manifest says {size}"
        raise InputError(f"{path} {state}: preprocess the data again")


def _file_facts(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

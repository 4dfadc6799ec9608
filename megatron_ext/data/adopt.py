"""Megatron's .bin and .idx that others wrote, made a dataset (see indexed.py): what they lack is written beside them.

Every document is held against vocabulary and grammar. The ids are read in pieces; what a piece has is kept in
PREFIX.adopting/, so that a program that was killed goes on with the next piece. Sidecar, vocabulary and manifest appear
at the end, by renames, the manifest last. The .bin and the .idx are not touched.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.data.array_cache import stamp
from megatron_ext.data.forked import map_forked
from megatron_ext.data.index_file import foreign_lengths
from megatron_ext.data.manifest import (
    BESIDE_IDS,
    FORMAT_VERSION,
    Manifest,
    blocks,
    dataset_path,
    discard,
    file_facts,
    is_whole,
    partial_path,
    publish,
)
from megatron_ext.data.merge import Each
from megatron_ext.data.sidecar import KINDS, Sidecar, SidecarBuilder, document_kind, write_sidecar
from megatron_ext.data.survey import MOST_NAMED, Offence, runs
from megatron_ext.files import replacing, writing
from megatron_ext.vocab import DocumentError, Vocabulary, decode_document, segment_spans

PIECE_IDS = 1 << 26
"""Ids of a piece, about: a minute's work at most is done again."""

_VERSION = 1


class NotDocuments(InputError):
    """Some documents of a shard are none; `first` are the first of them."""

    def __init__(self, message: str, first: tuple[Offence, ...]) -> None:
        super().__init__(message)
        self.first = first


@dataclass(frozen=True, kw_only=True)
class Adoption:
    """A shard that is to become a dataset."""

    prefix: Path
    vocabulary: Vocabulary
    vision_tokenizer: str | None
    """Identity of what made the visual ids; None: there are none."""
    lengths: np.ndarray
    """int32: ids of each document."""

    @classmethod
    def of(cls, prefix: str | Path, vocabulary: Vocabulary, vision_tokenizer: str | None) -> "Adoption":
        """Raises InputError: no such shard, or not in the form that a dataset has."""
        prefix = Path(prefix)
        lengths = foreign_lengths(dataset_path(prefix, ".idx"))
        path = dataset_path(prefix, ".bin")
        size = 4 * int(lengths.sum(dtype=np.int64))
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise InputError(f"{path} {state}, {path.stem}.idx says {size}: copy or write both again")
        if not len(lengths):
            raise InputError(f"{dataset_path(prefix, '.idx')} has no document: there is nothing to adopt")
        return cls(prefix=prefix, vocabulary=vocabulary, vision_tokenizer=vision_tokenizer, lengths=lengths)

    @property
    def num_ids(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def finished(self) -> Manifest | None:
        """The manifest where the shard is a dataset already.

        Raises:
            InputError: of another vocabulary or vision tokenizer.
        """
        if not is_whole(self.prefix):
            return None
        path = dataset_path(self.prefix, ".manifest.json")
        manifest = Manifest.read(path)
        for name, given in (("vocabulary", self.vocabulary.identity), ("vision_tokenizer", self.vision_tokenizer)):
            if given not in (getattr(manifest, name), None):
                raise InputError(
                    f"{path} says {name} {getattr(manifest, name)}, given is {given}: remove it to adopt the shard anew"
                )
        return manifest

    def do(self, workers: int, advance: Callable[[int], None]) -> Manifest:
        """Write what the shard lacks; `advance` is told of ids.

        Raises:
            NotDocuments: documents that are none.
            InputError: visual ids without a vision tokenizer, a file that changed meanwhile, a full disk.
        """
        before = self._facts()
        with writing(self.prefix, "prefix"):
            parts = self._begin(before)
            with ThreadPoolExecutor(1) as beside:  # hashing takes one core, whatever else there is to do
                hashed = beside.submit(self._hash)
                sidecars = self._examine(parts, workers, advance)
                ids, visual = hashed.result()
            if visual and self.vision_tokenizer is None:
                raise InputError(
                    f"vision_tokenizer is empty, and {self.prefix} holds {visual:,} visual ids: give the folder or the "
                    "identity of the vision tokenizer that made them"
                )
            try:
                manifest = self._prepare(sidecars, ids, visual)
                if self._facts() != before:
                    raise InputError(f"{self.prefix}.bin or .idx changed while it was read: start again")
                publish([self.prefix], BESIDE_IDS)
            finally:
                discard(self.prefix)
            shutil.rmtree(parts)
        return manifest

    def _facts(self) -> dict[str, object]:
        """All that the parts depend on."""
        return {
            "version": _VERSION,
            "vocabulary": self.vocabulary.identity,
            "files": [list(stamp(dataset_path(self.prefix, suffix))) for suffix in (".bin", ".idx")],
            "piece_ids": PIECE_IDS,
        }

    def _begin(self, facts: dict[str, object]) -> Path:
        """The folder of the parts; emptied where it holds those of other files or of another vocabulary."""
        folder = dataset_path(self.prefix, ".adopting")
        record = folder / "of.json"
        if not record.is_file() or record.read_text() != json.dumps(facts):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            with replacing(record) as temporary:
                temporary.write_text(json.dumps(facts))
        return folder

    def _examine(self, parts: Path, workers: int, advance: Callable[[int], None]) -> list[Path]:
        """The sidecars of all pieces, those that are missing written."""
        pieces = list(runs(self.lengths, PIECE_IDS))
        begins = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        paths = [parts / f"{begin:012d}.npz" for begin, _ in pieces]

        def examine(number: int) -> list[Offence]:
            begin, end = pieces[number]
            return self._examine_piece(paths[number], begin, begins[begin : end + 1])

        wrong, first = 0, []
        for (begin, end), offences in zip(pieces, map_forked(examine, range(len(pieces)), workers), strict=True):
            wrong += len(offences)
            first += offences[: MOST_NAMED - len(first)]
            advance(int(begins[end] - begins[begin]))
        if wrong:
            raise NotDocuments(
                f"{self.prefix}: {wrong:,} of {len(self.lengths):,} documents are none of vocabulary "
                f"{self.vocabulary.layout.name} ({first[0]}): write them as docs/data_format.md says, or give their "
                "vocabulary",
                tuple(first),
            )
        return paths

    def _examine_piece(self, path: Path, first: int, begins_D: np.ndarray) -> list[Offence]:
        """Write the sidecar of the documents from `first` on, which begin at ids `begins_D`, the last of which is their
        end; or say which of them are none."""
        if path.exists():
            return []
        # An empty file cannot be mapped.
        ids_N = np.memmap(dataset_path(self.prefix, ".bin"), np.int32, "r") if self.num_ids else np.empty(0, np.int32)
        builder, offences = SidecarBuilder(), []
        for number, (begin, end) in enumerate(itertools.pairwise(begins_D.tolist()), first):
            key = f"{self.prefix.name}#{number}"
            try:
                segments = decode_document(np.asarray(ids_N[begin:end]), self.vocabulary)
            except DocumentError as error:
                offences.append(Offence(number, key, error.position, error.reason))
                continue
            bounds = segment_spans(segments, self.vocabulary)
            kind = KINDS.index(document_kind(segments))
            builder.add(np.array([kind], np.uint8), [key], np.array([len(bounds)]), bounds)
        if not offences:
            with replacing(path, is_shared=True) as temporary:
                write_sidecar(temporary, [builder.build()])
        return offences

    def _hash(self) -> tuple[dict[str, int | str], int]:
        """Facts of the .bin, and how many of its ids are visual."""
        digest, size, visual = hashlib.sha256(), 0, 0
        for block in blocks(dataset_path(self.prefix, ".bin")):
            digest.update(block)
            size += len(block)
            visual += np.count_nonzero(self.vocabulary.layout.is_visual(np.frombuffer(block, np.int32)))
        return {"bytes": size, "sha256": digest.hexdigest()}, int(visual)

    def _prepare(self, sidecars: list[Path], ids: dict[str, int | str], visual: int) -> Manifest:
        """Everything but the .bin and the .idx, under temporary names."""
        sidecar_path = partial_path(self.prefix, ".spans.npz")
        sidecar = write_sidecar(sidecar_path, Each(sidecars, Sidecar.read))
        kinds = Sidecar.read(sidecar_path).kinds
        self.vocabulary.save(partial_path(self.prefix, ".vocabulary"))
        counts = [np.bincount(kinds, weights, len(KINDS)).astype(np.int64).tolist() for weights in (None, self.lengths)]
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            vocabulary=self.vocabulary.identity,
            vision_tokenizer=self.vision_tokenizer if visual else None,
            documents=dict(zip(KINDS, counts[0], strict=True)),
            ids=dict(zip(KINDS, counts[1], strict=True)),
            visual_ids=visual,
            longest=int(self.lengths.max()),
            files={
                ".bin": ids,
                ".idx": file_facts(dataset_path(self.prefix, ".idx")),
                ".spans.npz": file_facts(sidecar_path),
            },
            sidecar=sidecar,
        )
        manifest.save(partial_path(self.prefix, ".manifest.json"))
        return manifest

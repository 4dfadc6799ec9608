"""What preprocessing reads: units (tars of tokenized media, files of rows or texts), dealt to shards, in batches.

The units of a shard follow each other in the order of all units, so that the shards' documents, one shard after the
other, are those of one run over everything.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_ext.config import InputError, as_dict
from megatron_ext.data.array_cache import stamp
from megatron_ext.data.drafts import ROW_FIELDS
from megatron_ext.data.options import PreprocessConfig
from megatron_ext.data.sources import RawSample, TokenizedFolder, TokenizedShard
from megatron_ext.media.texts import BadText, find_text_files, read_rows, read_texts
from megatron_ext.vocab import Vocabulary

Kind = Literal["media", "rows", "text"]

RECIPE_VERSION = 2
"""Rises when the same inputs and options give other documents."""

_BATCH_ITEMS, _BATCH_CHARACTERS = 1024, 4 << 20
_NO_INFLUENCE = {"output_prefix", "max_bad_fraction", "shard_index", "num_shards", "workers", "overwrite"}
_FILES = {"vocab", "vision", "rows", "row_media", "text", "duplicates"}  # their content counts, not how it is named


class Unit(NamedTuple):
    """What one shard works on alone."""

    kind: Kind
    path: Path
    size: int
    """Bytes of the file."""
    samples: int | None
    """How many it holds, where that is known before."""
    tar: tuple[TokenizedFolder, TokenizedShard] | None


class Batch(NamedTuple):
    """What a worker encodes at once."""

    kind: Kind
    path: Path
    """The file of its unit."""
    items: list
    """RawSample, (key, row) or (key, text); or a BadText in its place."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All inputs of a configuration, found and checked."""

    folders: tuple[TokenizedFolder, ...]
    row_folders: tuple[TokenizedFolder, ...]
    tables: tuple[Path, ...]
    """Perceptual hashes of pictures."""
    units: tuple[Unit, ...]

    @classmethod
    def find(cls, config: PreprocessConfig) -> "Inputs":
        """Raises InputError: something is missing, unreadable, or named twice."""
        folders = tuple(TokenizedFolder.open(path) for path in config.vision)
        names = [folder.path.resolve() for folder in folders]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise InputError(f"vision has {folders[number].path} twice: its documents would be there twice")
        tars = [(folder, shard) for folder in folders for shard in folder.shards]
        media = [
            Unit(
                "media",
                folder.path / shard.name,
                (folder.path / shard.name).stat().st_size,
                shard.samples,
                (folder, shard),
            )
            for folder, shard in tars
        ]
        rows = [
            Unit("rows", path, path.stat().st_size, None, None) for path in find_text_files(config.rows, option="rows")
        ]
        texts = [Unit("text", path, path.stat().st_size, None, None) for path in find_text_files(config.text)]
        return cls(
            folders=folders,
            row_folders=tuple(TokenizedFolder.open(path) for path in config.row_media),
            tables=tuple(find_text_files(config.duplicates, option="duplicates")),
            units=(*media, *rows, *texts),
        )

    @property
    def tars(self) -> tuple[tuple[TokenizedFolder, TokenizedShard], ...]:
        """All tokenized media, each tar once, also where rows refer to what is captioned."""
        tars = ((folder, shard) for folder in (*self.folders, *self.row_folders) for shard in folder.shards)
        return tuple({(folder.path / shard.name).resolve(): (folder, shard) for folder, shard in tars}.values())

    @property
    def row_files(self) -> tuple[Path, ...]:
        return tuple(unit.path for unit in self.units if unit.kind == "rows")

    def vision_tokenizer(self, vocabulary: Vocabulary) -> str | None:
        """That of all folders; refuses two, and one whose codebook is not the vocabulary's."""
        layout = vocabulary.layout
        folders = (*self.folders, *self.row_folders)
        for folder in folders:
            if folder.codebook_size != layout.codebook_size:
                raise InputError(
                    f"{folder.path} was tokenized with a codebook of {folder.codebook_size}, vocabulary {layout.name} "
                    f"has {layout.codebook_size}: set vocab.codebook_size, or tokenize with the vocabulary's vision "
                    "tokenizer"
                )
            if folder.vision_tokenizer != folders[0].vision_tokenizer:
                raise InputError(
                    f"{folders[0].path} was made by vision tokenizer {folders[0].vision_tokenizer}, {folder.path} by "
                    f"{folder.vision_tokenizer}: tokenize all media of a dataset with one"
                )
        return folders[0].vision_tokenizer if folders else None

    def recipe(self, config: PreprocessConfig, vocabulary: Vocabulary) -> str:
        """Digest of all that shapes the documents: inputs, options, vocabulary; the same for every shard."""
        options = {
            field.name: as_dict(getattr(config, field.name))
            for field in fields(config)
            if field.name not in _NO_INFLUENCE | _FILES
        }
        referred = [(shard.name, shard.sha256) for folder in self.row_folders for shard in folder.shards]
        content = [
            RECIPE_VERSION,
            options,
            vocabulary.identity,
            [(unit.kind, *_stamp(unit.path, unit.tar)) for unit in self.units],
            referred,
            [_stamp(path, None) for path in self.tables],
        ]
        return "sha256:" + hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _stamp(path: Path, tar: tuple[TokenizedFolder, TokenizedShard] | None) -> tuple[str, int | str, int]:
    """As `stamp`, but a tar's hash is in its folder's manifest."""
    return (tar[1].name, tar[1].sha256, path.stat().st_size) if tar else stamp(path)


def deal(units: Sequence[Unit], shard: int, num_shards: int) -> list[Unit]:
    """The units of a shard: those whose middle, in bytes of all units, falls into its part."""
    total = sum(unit.size for unit in units) or 1
    middles = [
        end - unit.size / 2 for unit, end in zip(units, itertools.accumulate(u.size for u in units), strict=True)
    ]
    return [
        unit
        for unit, middle in zip(units, middles, strict=True)
        if min(int(middle * num_shards / total), num_shards - 1) == shard
    ]


def read_batches(units: Sequence[Unit], config: PreprocessConfig, on_read: Callable[[int], None]) -> Iterator[Batch]:
    """The units' content, in order. A key that comes again within a unit comes as a BadText.

    Raises:
        InputError: an unreadable or damaged file.
    """
    for unit in units:
        items: list = []
        characters = 0
        for item, size in _items(unit, config, on_read):
            items.append(item)
            characters += size
            if len(items) == _BATCH_ITEMS or characters >= _BATCH_CHARACTERS:
                yield Batch(unit.kind, unit.path, items)
                items, characters = [], 0
        if items:
            yield Batch(unit.kind, unit.path, items)


def row_place(path: Path, key: str) -> str:
    """Where a row is: rows of several files may have one key."""
    return key if key.startswith(f"{path.as_posix()}#") else f"{path}: {key}"


def _items(
    unit: Unit, config: PreprocessConfig, on_read: Callable[[int], None]
) -> Iterator[tuple[RawSample | tuple | BadText, int]]:
    """(item, its size) of a unit."""
    if unit.kind == "text":
        for item in read_texts(unit.path, config.text_unit, on_read, field=config.text_field):
            yield item, 0 if isinstance(item, BadText) else len(item[1])
        return
    seen: set[str] = set()
    source = (
        _tar_items(unit, on_read) if unit.tar else ((item, 256) for item in read_rows(unit.path, ROW_FIELDS, on_read))
    )
    for number, (item, size) in enumerate(source, 1):
        key = item.place if isinstance(item, RawSample | BadText) else item[0]
        if not isinstance(item, BadText) and key in seen:
            place = key if unit.tar else row_place(unit.path, key)
            item = BadText(f"{place} (sample {number})", "its key has come before")
        seen.add(key)
        yield item, size


def _tar_items(unit: Unit, on_read: Callable[[int], None]) -> Iterator[tuple[RawSample, int]]:
    folder, shard = unit.tar
    done = 0
    for raw in folder.read_shard(shard):
        on_read(raw.offset - done)
        done = raw.offset
        yield raw, len(raw.parts.get("codes.npy", b""))
    on_read(unit.size - done)

"""Folders of tokenized pictures and clips.

A tokenized folder holds manifest.json and tar shards in WebDataset's layout; a sample is KEY.codes.npy (unsigned
integers [H, W] for a picture, [T, H, W] for a clip) and KEY.json (key, kind, captions, timing of a clip).
"""

import io
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.files import parse_json
from megatron_ext.vocab import Image, Video

TOKENS_FORMAT_VERSION = 1


@dataclass(frozen=True)
class MediaSample:
    """A tokenized picture or clip and its captions."""

    key: str
    media: Image | Video
    captions: tuple[str, ...]


class RawSample(NamedTuple):
    """A sample as its shard holds it."""

    place: str
    """Shard and name in it."""
    parts: Mapping[str, bytes]
    """Content by suffix."""
    offset: int
    """Where in the shard its first member begins."""


@dataclass(frozen=True)
class TokenizedShard:
    """One tar of a folder."""

    name: str
    sha256: str
    samples: int


@dataclass(frozen=True)
class TokenizedFolder:
    """A folder of tokenized media, as its manifest describes it."""

    path: Path
    vision_tokenizer: str
    codebook_size: int
    shards: tuple[TokenizedShard, ...]

    @classmethod
    def open(cls, path: str | Path) -> "TokenizedFolder":
        """Raises InputError: no readable manifest, or a shard is missing."""
        manifest_path = Path(path) / "manifest.json"
        try:
            manifest = parse_json(manifest_path.read_bytes())
            version = manifest["format_version"]
            if version != TOKENS_FORMAT_VERSION:
                raise InputError(f"{manifest_path} has format version {version}, not {TOKENS_FORMAT_VERSION}")
            folder = cls(
                path=Path(path),
                vision_tokenizer=str(manifest["vision_tokenizer"]),
                codebook_size=int(manifest["codebook_size"]),
                shards=tuple(
                    TokenizedShard(shard["name"], str(shard["sha256"]), int(shard["samples"]))
                    for shard in manifest["shards"]
                ),
            )
            said = sum(manifest["samples"].values())
        except FileNotFoundError:
            raise InputError(f"{manifest_path} is missing: give a folder that tokenize_vision.py completed") from None
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{manifest_path} is damaged ({error!r}): tokenize again") from None
        for shard in folder.shards:
            if not (folder.path / shard.name).is_file():
                raise InputError(f"{folder.path / shard.name} is missing, the manifest names it: tokenize again")
        if said != folder.num_samples:
            raise InputError(f"{path} holds {folder.num_samples} samples, its manifest says {said}: tokenize again")
        return folder

    @property
    def num_samples(self) -> int:
        """Of all shards."""
        return sum(shard.samples for shard in self.shards)

    def samples(self) -> Iterator[MediaSample]:
        """All samples, in the order of shards and of their members.

        Raises:
            InputError: an unreadable shard or sample, a code outside the codebook, or another number of samples.
        """
        for shard in self.shards:
            for raw in self.read_shard(shard):
                yield self.parse(raw)

    def read_shard(self, shard: TokenizedShard) -> Iterator[RawSample]:
        """The samples of a shard, not yet looked into.

        Raises:
            InputError: an unreadable shard, or another number of samples than the manifest says.
        """
        path = self.path / shard.name
        count = 0
        try:
            with path.open("rb") as file:
                for raw in _raw_samples(path, file):
                    yield raw
                    count += 1
        except (OSError, tarfile.TarError) as error:
            raise InputError(f"cannot read shard {path} ({error}): tokenize again") from None
        if count != shard.samples:
            raise InputError(f"{path} holds {count} samples, the manifest says {shard.samples}: tokenize again")

    def read_at(self, shard: TokenizedShard, offset: int) -> MediaSample:
        """The sample whose first member begins at `offset` of a shard.

        Raises:
            InputError: as `samples`.
        """
        path = self.path / shard.name
        try:
            with path.open("rb") as file:
                file.seek(offset)
                return self.parse(next(_raw_samples(path, file)))
        except (OSError, tarfile.TarError, StopIteration) as error:
            raise InputError(f"cannot read shard {path} ({error}): tokenize again") from None

    @staticmethod
    def key_of(raw: RawSample) -> str:
        """Raises InputError: a damaged sample."""
        try:
            return str(parse_json(raw.parts["json"])["key"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(raw, error) from None

    def parse(self, raw: RawSample) -> MediaSample:
        """Raises InputError: a damaged sample, or a code outside the codebook."""
        return parse_sample(raw, self.codebook_size)


def parse_sample(raw: RawSample, codebook_size: int) -> MediaSample:
    """Raises InputError: a damaged sample, or a code outside the codebook."""
    try:
        facts = parse_json(raw.parts["json"])
        codes = np.load(io.BytesIO(raw.parts["codes.npy"]), allow_pickle=False)
        key, kind, captions = str(facts["key"]), facts["kind"], tuple(facts["captions"])
        media = Image(codes) if kind == "image" else Video(codes, facts["frame_rate_mhz"], facts["duration_ms"])
    except (KeyError, TypeError, ValueError) as error:  # ValueError: JSON, npy, and InputError of Image and Video
        raise _damaged(raw, error) from None
    if codes.max() >= codebook_size:
        raise InputError(f"{raw.place} has visual code {codes.max()}, the codebook has {codebook_size}: tokenize again")
    return MediaSample(key, media, captions)


def _damaged(raw: RawSample, error: Exception) -> InputError:
    return InputError(f"{raw.place} is damaged ({error!r}): tokenize again")


def _raw_samples(path: Path, file: BinaryIO) -> Iterator[RawSample]:
    """Neighbouring members of one key are a sample; a suffix that comes again begins another one of the same key."""
    sample: RawSample | None = None
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            key, suffix = _split_name(member.name)
            place = f"{path}: {key}"
            if sample is None or place != sample.place or suffix in sample.parts:
                if sample is not None:
                    yield sample
                sample = RawSample(place, {}, member.offset)
            content: Any = tar.extractfile(member)  # not None: the member is a file
            sample.parts[suffix] = content.read()
            tar.members = []  # tarfile would keep every header it has seen
    if sample is not None:
        yield sample


def _split_name(name: str) -> tuple[str, str]:
    key, suffix = re.fullmatch(r"((?:.*/)?[^./]*)\.?([^/]*)", name).groups()
    return key, suffix

"""Folders of tokenized pictures and clips.

A tokenized folder holds manifest.json and tar shards in WebDataset's layout; a sample is KEY.codes.npy (unsigned
integers [H, W] for a picture, [T, H, W] for a clip) and KEY.json (key, kind, captions, timing of a clip).
"""

import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.vocab import Image, Video

TOKENS_FORMAT_VERSION = 1


@dataclass(frozen=True)
class MediaSample:
    """A tokenized picture or clip and its captions."""

    key: str
    media: Image | Video
    captions: tuple[str, ...]


@dataclass(frozen=True)
class TokenizedFolder:
    """A folder of tokenized media, as its manifest describes it."""

    path: Path
    vision_tokenizer: str
    codebook_size: int
    num_samples: int
    shards: tuple[str, ...]

    @classmethod
    def open(cls, path: str | Path) -> "TokenizedFolder":
        """Raises InputError: no readable manifest, or a shard is missing."""
        manifest_path = Path(path) / "manifest.json"
        try:
            manifest = json.loads(manifest_path.read_text())
            version = manifest["format_version"]
            if version != TOKENS_FORMAT_VERSION:
                raise InputError(f"{manifest_path} has format version {version}, not {TOKENS_FORMAT_VERSION}")
            folder = cls(
                path=Path(path),
                vision_tokenizer=str(manifest["vision_tokenizer"]),
                codebook_size=int(manifest["codebook_size"]),
                num_samples=sum(manifest["samples"].values()),
                shards=tuple(shard["name"] for shard in manifest["shards"]),
            )
        except FileNotFoundError:
            raise InputError(f"{manifest_path} is missing: give a folder that tokenize_vision.py completed") from None
        except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{manifest_path} is damaged ({error!r}): tokenize again") from None
        for name in folder.shards:
            if not (folder.path / name).is_file():
                raise InputError(f"{folder.path / name} is missing, the manifest names it: tokenize again")
        return folder

    def samples(self) -> Iterator[MediaSample]:
        """All samples, in the order of shards and of their members.

        Raises:
            InputError: an unreadable shard or sample, a code outside the codebook, or another number of samples.
        """
        count = 0
        for name in self.shards:
            for key, parts in _tar_samples(self.path / name):
                yield self._sample(f"{self.path / name}: {key}", parts)
                count += 1
        if count != self.num_samples:
            raise InputError(f"{self.path} holds {count} samples, its manifest says {self.num_samples}: tokenize again")

    def _sample(self, place: str, parts: Mapping[str, bytes]) -> MediaSample:
        try:
            facts = json.loads(parts["json"])
            codes = np.load(io.BytesIO(parts["codes.npy"]), allow_pickle=False)
            key, kind, captions = str(facts["key"]), facts["kind"], tuple(facts["captions"])
            media = Image(codes) if kind == "image" else Video(codes, facts["frame_rate_mhz"], facts["duration_ms"])
        except (KeyError, TypeError, ValueError) as error:  # ValueError: JSON, npy, and InputError of Image and Video
            raise InputError(f"{place} is damaged ({error!r}): tokenize again") from None
        if codes.max() >= self.codebook_size:
            raise InputError(
                f"{place} has visual code {codes.max()}, the codebook has {self.codebook_size}: tokenize again"
            )
        return MediaSample(key, media, captions)


def _tar_samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {suffix: content}) of neighbouring members of one key; suffix is what follows a name's first dot."""
    try:
        with tarfile.open(path, "r:") as tar:
            files = ((*_split_name(member.name), member) for member in tar if member.isfile())
            for key, group in itertools.groupby(files, key=lambda file: file[0]):
                yield key, {suffix: _read_member(tar, member) for _, suffix, member in group}
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"cannot read shard {path} ({error}): tokenize again") from None


def _split_name(name: str) -> tuple[str, str]:
    key, suffix = re.fullmatch(r"((?:.*/)?[^./]*)\.?([^/]*)", name).groups()
    return key, suffix


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file: Any = tar.extractfile(member)  # not None: the member is a file
    return file.read()

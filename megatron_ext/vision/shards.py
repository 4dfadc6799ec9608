"""Tokenized media on disk: tar shards of codes in WebDataset's layout, and a manifest.

codes-PPPPP-CCCCC.tar            chunk C of input P: per sample KEY.codes.npy (uint16 or uint32; [H, W] of a picture,
                                 [T, H, W] of a clip) and KEY.json; absent where no sample of the chunk could be used
finished/made_by.json            what shaped the codes; chunks of another making are never mixed in
finished/codes-PPPPP-CCCCC.json  what became of the chunk's inputs; written after the tar, says that it is done
skipped.jsonl, manifest.json     what the folder holds, written last, when all chunks are done

A chunk's bytes are a function of its inputs, so it does not matter which job writes it, nor whether two do.
"""

import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.files import replacing, writing
from megatron_ext.media.members import add_member, stem_of

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SKIPPED = "skipped.jsonl"
FINISHED = "finished"
MADE_BY = "made_by.json"
KINDS = ("image", "video")

Skipped = dict[str, str]
"""key, source and reason of an input that could not be used."""

Record = dict[str, Any]
"""What became of a chunk's inputs."""


@dataclass(frozen=True, kw_only=True)
class TokenizedSample:
    """One picture or clip as codes."""

    key: str
    """Unique in the folder."""

    kind: Literal["image", "video"]
    """A picture or a clip."""

    codes: np.ndarray
    """[H, W] of a picture, [T, H, W] of a clip."""

    captions: tuple[str, ...]
    """All languages, in the source's order."""

    source: str
    """Where the media file was."""

    source_sha256: str
    """SHA-256 of the media file."""

    frame_rate_mhz: int | None = None
    """Frames per 1000 seconds that were encoded; clips only."""

    duration_ms: int | None = None
    """Milliseconds that were encoded; clips only."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of one input, tokenized at once."""

    part: int
    """Number of the input."""

    number: int
    """Number of the chunk in the input."""

    count: int
    """How many chunks the input has."""

    inputs_sha256: str
    """Of what the chunk holds: names, sizes and times of files."""

    @property
    def name(self) -> str:
        return _name(self.part, self.number)


class CodesFolder:
    """A folder of shards that any number of jobs write, and one of them completes."""

    def __init__(self, folder: str | Path, header: dict[str, Any], *, overwrite: bool = False) -> None:
        """`header` holds what shaped the codes and goes into the manifest; JSON values.

        Raises:
            InputError: the folder was made with another header, unless `overwrite`; it cannot be written.
        """
        self.folder = Path(folder)
        self._finished = self.folder / FINISHED
        self._overwrite = overwrite
        self.header = {"format_version": FORMAT_VERSION, **header}
        self._made = hashlib.sha256(json.dumps(self.header, sort_keys=True).encode()).hexdigest()
        with writing(self.folder, "output"):
            self._finished.mkdir(parents=True, exist_ok=True)
        if self._check_making() and _read(self._finished / MADE_BY) != self.header:
            self._reopen()
            _replace(self._finished / MADE_BY, _json(self.header))

    def finished(self, chunk: Chunk) -> Record | None:
        """The record of a chunk that is done and whole, None of one to be done.

        Raises:
            InputError: it was made of other inputs, unless the folder is to be overwritten.
        """
        record = _read(self._record(chunk.name))
        if record is None or record.get("made") != self._made:
            return None
        if (record["inputs_sha256"], record["chunks"]) != (chunk.inputs_sha256, chunk.count):
            self._refuse("inputs_sha256", record["inputs_sha256"], chunk.inputs_sha256)
            return None
        if self._overwrite and record["duplicates"]:  # who else has these keys may have changed
            return None
        tar = record["tar"]
        try:
            whole = tar is None or hashlib.sha256((self.folder / tar["name"]).read_bytes()).hexdigest() == tar["sha256"]
        except OSError:
            whole = False
        return record if whole else None

    def write(self, chunk: Chunk, samples: list[TokenizedSample], skipped: list[Skipped]) -> Record:
        """A chunk that is done: its samples, whose keys differ, and its inputs that could not be used."""
        self._reopen()
        record = {
            "made": self._made,
            "inputs_sha256": chunk.inputs_sha256,
            "chunks": chunk.count,
            "samples": {kind: sum(sample.kind == kind for sample in samples) for kind in KINDS},
            "without_captions": sum(not sample.captions for sample in samples),
            "keys": [sample.key for sample in samples],
            "skipped": skipped,
            "duplicates": 0,
        }
        return self._write(chunk.name, record, self._tar(samples))

    def records(self, parts: int) -> dict[str, Record]:
        """Name -> record of all chunks of inputs 0 to `parts` - 1, in order, `hashes` in the place of their keys.

        Of a key that several samples have the first keeps it; the others are taken out of their shards, and are
        skipped with that reason.

        Raises:
            InputError: chunks are not done.
        """
        found: dict[str, Record] = {}
        missing = []
        for part in range(parts):
            first = self._complete(_name(part, 0))
            for number in range(first["chunks"] if first else 1):
                name = _name(part, number)
                record = self._complete(name)
                if first and record and record["chunks"] == first["chunks"]:
                    found[name] = _hashed(record)
                else:
                    missing.append(name)
        if missing:
            named = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise InputError(f"{self.folder}: {len(missing)} shards are not finished ({named}): run their jobs again")
        for name, keys in self._duplicates(found).items():
            found[name] = _hashed(self._without(name, keys))
        return found

    def complete(self, records: dict[str, Record]) -> dict[str, Any]:
        """All chunks are done: write the manifest, if it is not there, and remove what is of no chunk.

        Returns the manifest.
        """
        skipped = [item for record in records.values() for item in record["skipped"]]
        tars = [(tar, record) for record in records.values() if (tar := record["tar"])]
        manifest = {
            **self.header,
            "samples": {kind: sum(record["samples"][kind] for record in records.values()) for kind in KINDS},
            "without_captions": sum(record["without_captions"] for record in records.values()),
            "skipped": len(skipped),
            "shards": [
                {"name": tar["name"], "sha256": tar["sha256"], "samples": len(record["hashes"])} for tar, record in tars
            ],
        }
        if _read(self.folder / MANIFEST) == manifest:
            return manifest
        lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in skipped)
        _replace(self.folder / SKIPPED, "".join(lines).encode())
        wanted = {tar["name"] for tar, _ in tars} | {MADE_BY} | {f"{name}.json" for name in records}
        unfinished = self.folder.glob(".*.tmp")  # of killed jobs
        for path in (*self.folder.glob("codes-*.tar"), *unfinished, *self._finished.iterdir()):
            if path.name not in wanted:
                path.unlink(missing_ok=True)
        _replace(self.folder / MANIFEST, _json(manifest))
        return manifest

    def _complete(self, name: str) -> Record | None:
        """A record of this making whose shard has its size."""
        record = _read(self._record(name))
        if record is None or record.get("made") != self._made:
            return None
        tar = record["tar"]
        try:
            return record if tar is None or (self.folder / tar["name"]).stat().st_size == tar["size"] else None
        except OSError:
            return None

    def _duplicates(self, records: dict[str, Record]) -> dict[str, dict[str, str]]:
        """Of each chunk with keys that an earlier one has: key -> the earlier one's name."""
        hashes = np.concatenate([np.zeros(0, np.uint64), *(record["hashes"] for record in records.values())])
        hashes.sort()
        suspects = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        holder: dict[str, str] = {}
        found: dict[str, dict[str, str]] = {}
        for name, record in records.items():
            places = np.flatnonzero(np.isin(record["hashes"], suspects))
            keys = json.loads(self._record(name).read_text(encoding="utf-8"))["keys"] if len(places) else []
            for key in (keys[place] for place in places):
                if holder.setdefault(key, name) != name:
                    found.setdefault(name, {})[key] = holder[key]
        return found

    def _without(self, name: str, keys: dict[str, str]) -> Record:
        """The record, and the shard, without the samples of `keys` (key -> who has it)."""
        record = json.loads(self._record(name).read_text(encoding="utf-8"))
        samples = [(json.loads(files[1][1]), files) for files in _samples(self.folder / record["tar"]["name"])]
        kept = [(fields, files) for fields, files in samples if fields["key"] not in keys]
        skipped = []
        for fields in (fields for fields, _ in samples if fields["key"] in keys):
            reason = f"its key is also that of a sample in {keys[fields['key']]}"
            skipped.append({"key": fields["key"], "source": fields["source"], "reason": reason})
        self._reopen()
        changed = record | {
            "samples": {kind: sum(fields["kind"] == kind for fields, _ in kept) for kind in KINDS},
            "without_captions": sum(not fields["captions"] for fields, _ in kept),
            "keys": [fields["key"] for fields, _ in kept],
            "skipped": record["skipped"] + skipped,
            "duplicates": record["duplicates"] + len(skipped),
        }
        return self._write(name, changed, _tar(itertools.chain.from_iterable(files for _, files in kept)))

    def _write(self, name: str, record: Record, content: bytes | None) -> Record:
        self._check_making()  # another job may have begun since
        path = self.folder / f"{name}.tar"
        if content is None:
            record = record | {"tar": None}
            path.unlink(missing_ok=True)
        else:
            digest = hashlib.sha256(content).hexdigest()
            record = record | {"tar": {"name": path.name, "sha256": digest, "size": len(content)}}
            _replace(path, content)
        if not self._check_making():
            # Not at the start: a program that fails before its first shard leaves nothing.
            _replace(self._finished / MADE_BY, _json(self.header))
        _replace(self._record(name), _json(record))
        return record

    def _tar(self, samples: list[TokenizedSample]) -> bytes | None:
        dtype = np.uint16 if self.header["codebook_size"] <= 1 << 16 else np.uint32
        return _tar(member for sample in samples for member in _members(sample, dtype))

    def _record(self, name: str) -> Path:
        return self._finished / f"{name}.json"

    def _check_making(self) -> bool:
        """Whether the folder says what it is made by; refuses another making."""
        found = _read(self._finished / MADE_BY)
        changed = next((key for key in self.header if found and found.get(key) != self.header[key]), None)
        if found is not None and changed is not None:
            self._refuse(changed, found.get(changed), self.header[changed])
        return found is not None

    def _reopen(self) -> None:
        # A reader must never find a manifest beside shards of another making.
        (self.folder / MANIFEST).unlink(missing_ok=True)

    def _refuse(self, what: str, found: Any, wanted: Any) -> None:
        if not self._overwrite:
            raise InputError(
                f"{self.folder} holds codes made with {what} {found!r}, this run has {wanted!r}: give another output, "
                "or overwrite: true to make them anew"
            )


def _name(part: int, chunk: int) -> str:
    return f"codes-{part:05d}-{chunk:05d}"


def _hashed(record: Record) -> Record:
    """The record with its keys as hashes: 8 bytes for each of perhaps a billion."""
    return {name: value for name, value in record.items() if name != "keys"} | {"hashes": _hashes(record["keys"])}


def _hashes(keys: list[str]) -> np.ndarray:
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def _members(sample: TokenizedSample, dtype: type) -> Iterator[tuple[str, bytes]]:
    """Name and content of a sample's files."""
    array = io.BytesIO()
    np.save(array, sample.codes.astype(dtype))
    fields: dict[str, Any] = {"key": sample.key, "kind": sample.kind, "captions": list(sample.captions)}
    if sample.kind == "video":
        fields |= {"frame_rate_mhz": sample.frame_rate_mhz, "duration_ms": sample.duration_ms}
    fields |= {"source": sample.source, "source_sha256": sample.source_sha256}
    stem = stem_of(sample.key)
    yield f"{stem}.codes.npy", array.getvalue()
    yield f"{stem}.json", json.dumps(fields, ensure_ascii=False).encode()


def _tar(members: Iterable[tuple[str, bytes]]) -> bytes | None:
    """The files as a tar; None without any."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            add_member(tar, name, content)
        is_empty = not tar.offset
    return None if is_empty else buffer.getvalue()


def _samples(path: Path) -> Iterator[tuple[tuple[str, bytes], ...]]:
    """(codes, fields) of each sample of a shard, as `_members` gave them."""
    with tarfile.open(path, "r:") as tar:
        members = ((member.name, tar.extractfile(member).read()) for member in tar)  # type: ignore[union-attr]
        yield from zip(members, members, strict=True)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; what is none counts as absent."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _replace(path: Path, content: bytes) -> None:
    with writing(path, "output"), replacing(path, is_shared=True) as temporary:
        temporary.write_bytes(content)

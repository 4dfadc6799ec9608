"""Tokenized media on disk: tar shards of codes in WebDataset's layout, and a manifest.

codes-00000.tar   per sample KEY.codes.npy (uint16 or uint32; [H, W] picture, [T, H, W] clip) and KEY.json
manifest.json     what the folder holds; written last
manifest.partial.json   the same while the work goes on; finished shards are not made again
"""

import hashlib
import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_ext.config import InputError, writing

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PARTIAL_MANIFEST = "manifest.partial.json"


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


class ShardWriter:
    """Writes the shards of one folder, each at once by rename; takes up where an interrupted writer stopped."""

    def __init__(self, folder: str | Path, header: dict[str, Any], *, overwrite: bool = False) -> None:
        """`header` holds what shaped the codes and goes into the manifest; JSON values.

        Raises:
            InputError: the folder's header is another one; with `overwrite` the folder is started anew.
        """
        self.folder = Path(folder)
        with writing(self.folder, "output"):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.complete = False
        fresh = {"format_version": FORMAT_VERSION, **header}
        fresh |= {"samples": {"image": 0, "video": 0}, "skipped": [], "inputs_done": 0, "shards": []}
        self.manifest = fresh
        for name in (MANIFEST, PARTIAL_MANIFEST):
            found = self._read(name)
            if found is None:
                continue
            changed = next((key for key in ("format_version", *header) if found.get(key) != fresh[key]), None)
            if changed is None and self._is_whole(found):
                self.manifest, self.complete = found, name == MANIFEST
                return
            if changed is not None and not overwrite:
                raise InputError(
                    f"{self.folder} holds codes made with {changed} {found.get(changed)!r}, this run has "
                    f"{fresh[changed]!r}: give another output, or overwrite: true to remove them"
                )
        self._clear()

    @property
    def inputs_done(self) -> int:
        """How many of the input samples, in their order, the finished shards have used up."""
        return self.manifest["inputs_done"]

    def write(self, samples: list[TokenizedSample], skipped: list[dict[str, str]], inputs: int) -> None:
        """One more shard of `samples` (none where all of the `inputs` input samples were skipped)."""
        if samples:
            name = f"codes-{len(self.manifest['shards']):05d}.tar"
            content = self._tar(samples)
            _replace(self.folder / name, content)
            entry = {"name": name, "sha256": hashlib.sha256(content).hexdigest(), "samples": len(samples)}
            self.manifest["shards"].append(entry)
        for sample in samples:
            self.manifest["samples"][sample.kind] += 1
        self.manifest["skipped"] += skipped
        self.manifest["inputs_done"] += inputs
        self._write(PARTIAL_MANIFEST)

    def finish(self) -> None:
        """All inputs are done: the manifest becomes the final one."""
        self._write(MANIFEST)
        (self.folder / PARTIAL_MANIFEST).unlink(missing_ok=True)
        self.complete = True

    def _tar(self, samples: list[TokenizedSample]) -> bytes:
        buffer = io.BytesIO()
        dtype = np.uint16 if self.manifest["codebook_size"] <= 1 << 16 else np.uint32
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for sample in samples:
                array = io.BytesIO()
                np.save(array, sample.codes.astype(dtype))
                fields: dict[str, Any] = {"key": sample.key, "kind": sample.kind, "captions": list(sample.captions)}
                if sample.kind == "video":
                    fields |= {"frame_rate_mhz": sample.frame_rate_mhz, "duration_ms": sample.duration_ms}
                fields |= {"source": sample.source, "source_sha256": sample.source_sha256}
                text = json.dumps(fields, ensure_ascii=False).encode()
                for name, content in ((f"{sample.key}.codes.npy", array.getvalue()), (f"{sample.key}.json", text)):
                    member = tarfile.TarInfo(name)  # no times, no owner: equal samples give equal shards
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    def _read(self, name: str) -> dict[str, Any] | None:
        """A manifest; what is no JSON object counts as absent."""
        try:
            manifest = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return manifest if isinstance(manifest, dict) else None

    def _is_whole(self, manifest: dict[str, Any]) -> bool:
        """Whether all shards are as the manifest says."""
        try:
            shards = [(self.folder / shard["name"], shard["sha256"]) for shard in manifest["shards"]]
            return all(hashlib.sha256(path.read_bytes()).hexdigest() == digest for path, digest in shards)
        except (OSError, KeyError, TypeError):
            return False

    def _write(self, name: str) -> None:
        text = json.dumps(self.manifest, indent=1, ensure_ascii=False) + "\n"
        _replace(self.folder / name, text.encode())

    def _clear(self) -> None:
        # The manifests first: a reader must never find one beside shards of another making.
        for name in (MANIFEST, PARTIAL_MANIFEST):
            (self.folder / name).unlink(missing_ok=True)
        for path in self.folder.glob("codes-[0-9]*.tar"):
            path.unlink()


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with writing(path, "output"):
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

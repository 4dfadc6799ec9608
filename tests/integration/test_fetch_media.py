"""Media from packages: unpacked, chosen, named with their licences; what is missing is said; nothing twice."""

import hashlib
import importlib.util
import io
import json
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_ext.config import InputError
from tests.architecture.source import ROOT

_spec = importlib.util.spec_from_file_location("fetch_media", ROOT / "examples" / "fetch_media.py")
fetch_media = importlib.util.module_from_spec(_spec)
sys.modules["fetch_media"] = fetch_media
_spec.loader.exec_module(fetch_media)

COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2020 A
License: GPL-2+
 text

Files: photos/a.jpg
       photos/b?.jpg
Copyright: 2021 B
License: CC-BY-4.0
"""


def _photo(seed: int, size: tuple[int, int] = (300, 260), noise: float = 0.0) -> bytes:
    """A smooth picture of random blobs as PNG, its own for every seed."""
    random = np.random.default_rng(seed)
    blobs = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    array = np.asarray(blobs, dtype=float) + noise * np.random.default_rng(99).normal(size=(size[1], size[0], 3))
    file = io.BytesIO()
    Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(file, format="PNG")
    return file.getvalue()


def _bundle(files: dict[str, bytes]) -> bytes:
    """A Qt resource bundle with one folder `pictures`, as rcc writes it: the second file compressed with zlib."""
    names, data, nodes = b"", b"", []

    def name(text: str) -> int:
        nonlocal names
        offset = len(names)
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return offset

    nodes.append(struct.pack(">IHIIQ", 0, 2, 1, 1, 0))
    nodes.append(struct.pack(">IHIIQ", name("pictures"), 2, len(files), 2, 0))
    for number, (key, content) in enumerate(files.items()):
        stored = struct.pack(">I", len(content)) + zlib.compress(content) if number == 1 else content
        nodes.append(struct.pack(">IHIIQ", name(key), int(number == 1), 0x10000, len(data), 0))
        data += struct.pack(">I", len(stored)) + stored
    tree = b"".join(nodes)
    start = 20
    header = struct.pack(">4sIIII", b"qres", 2, start, start + len(tree), start + len(tree) + len(data))
    return header + tree + data + names


def test_bundle_members() -> None:
    files = {"a.webp": b"first", "b.webp": b"second" * 100, "c.png": b""}
    assert fetch_media.bundle_members(_bundle(files)) == {f"pictures/{name}": data for name, data in files.items()}


def test_licences(tmp_path: Path) -> None:
    path = tmp_path / "copyright"
    path.write_text(COPYRIGHT)
    licences = fetch_media.Licences.read(path)
    assert licences.of("photos/a.webp") == licences.of("photos/b2.jpg") == "CC-BY-4.0"
    assert licences.of("photos/c.jpg") == "GPL-2+"
    path.write_text("All rights\n\nnot machine-readable")
    assert fetch_media.Licences.read(path).of("photos/a.jpg") == "not stated"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that pip finds instead of PyPI's, a Debian package that is already fetched, a catalogue, a list."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "photos-1.0-py3-none-any.whl", "w") as wheel:
        for number in range(4):
            wheel.writestr(f"photos/p{number}.png", _photo(number))
        wheel.writestr("photos/z_again.png", _photo(2, noise=4.0))
        wheel.writestr("photos/large.png", _photo(7, (900, 700)))
        wheel.writestr("photos/small.png", _photo(8, (255, 300)))
        wheel.writestr("photos/broken.png", b"no picture")
        wheel.writestr("photos/clip.mp4", b"a clip")
        wheel.writestr("photos-1.0.dist-info/LICENSE", "MIT")
        wheel.writestr("photos-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: photos\nVersion: 1.0\n")
        wheel.writestr("photos-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("photos-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    debian = tmp_path / "media" / "packages" / "deb-1.0"
    (debian / "doc").mkdir(parents=True)
    (debian / "doc" / "copyright").write_text(COPYRIGHT)
    (debian / "a.rcc").write_bytes(_bundle({"a.webp": _photo(10), "other.webp": _photo(11)}))
    debian.with_name("deb-1.0.json").write_text('{"version": "1.0-2"}')
    pip = {"registry": "pypi", "version": "1.0", "licence_file": "photos-1.0.dist-info/LICENSE"}
    groups = [
        {"key": "pip", "folder": "photos/", "licence": "MIT", "names": ["*.png"]},
        {"key": "pip", "clips": True, "folder": "photos/", "licence": "MIT", "names": ["clip.mp4"]},
    ]
    bundle = {"key": "deb", "archive": "a.rcc", "folder": "pictures/", "source": "photos/", "names": ["a.webp"]}
    packages = [
        {"name": "photos", **pip, "groups": groups},
        {"name": "deb-1.0", "registry": "debian", "licence_file": "doc/copyright", "groups": [bundle]},
    ]
    _write_json(tmp_path / "catalogue.json", {"packages": packages})
    held_out = {"pip-z_again": fetch_media.hashlib.sha256(_photo(2, noise=4.0)).hexdigest()}
    _write_json(tmp_path / "held_out.json", {"photographs": held_out})
    return tmp_path


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


def _fetch(workplace: Path) -> None:
    names = ("catalogue", "held_out")
    fetch_media.main([f"--output={workplace}/media", *(f"--{name}={workplace}/{name}.json" for name in names)])


def test_fetching(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    _fetch(workplace)
    media = workplace / "media"
    manifest = json.loads((media / "manifest.json").read_text())
    found = {record["path"]: record for record in manifest["files"]}
    photographs = {f"train/{key}.png" for key in ("pip-p0", "pip-p1", "pip-p3", "pip-large", "deb-a")}
    assert found.keys() == photographs | {"held_out/pip-z_again.png", "clips/pip-clip.mp4"}
    assert {f"{path.parent.name}/{path.name}" for folder in ("train", "held_out", "clips")
            for path in (media / folder).iterdir()} == found.keys()  # fmt: skip
    reasons = {item["key"]: item["reason"] for item in manifest["left_out"]}
    # The training photograph gives way to the held-out one that looks like it.
    assert reasons["pip-p2"] == "looks like pip-z_again"
    assert reasons["pip-small"] == "255x300 pixels: a side is under 256"
    assert reasons["pip-broken"].startswith("not a readable picture")
    record = found["train/deb-a.png"]
    assert record["file"] == "a.rcc!pictures/a.webp" and record["version"] == "1.0-2"
    assert record["licence"] == "CC-BY-4.0" and found["train/pip-p0.png"]["licence"] == "MIT"
    assert record["sha256"] == fetch_media.hashlib.sha256(_photo(10)).hexdigest()
    assert Image.open(media / "train" / "pip-large.png").size == (658, 512)
    np.testing.assert_array_equal(
        np.asarray(Image.open(media / "train" / "pip-p0.png")), np.asarray(Image.open(io.BytesIO(_photo(0))))
    )
    assert (media / "licences" / "photos.txt").read_text() == "MIT"
    assert "5 photographs to train on, 1 held out, 1 clips" in capsys.readouterr().out

    # Again, and with an empty registry: nothing is fetched twice, a lost file comes back, another list takes effect.
    (workplace / "wheels" / "photos-1.0-py3-none-any.whl").unlink()
    (media / "train" / "pip-p1.png").unlink()
    _write_json(workplace / "held_out.json", {"photographs": {"pip-p0": found["train/pip-p0.png"]["sha256"]}})
    _fetch(workplace)
    assert (media / "train" / "pip-p1.png").exists() and (media / "held_out" / "pip-p0.png").exists()
    assert not (media / "train" / "pip-p0.png").exists() and not (media / "held_out" / "pip-z_again.png").exists()


def test_a_debian_package_is_fetched_into_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository, state = tmp_path / "repository", tmp_path / "apt"
    package = repository / "tree"
    (package / "DEBIAN").mkdir(parents=True)
    fields = "Package: photos\nVersion: 1:2.0-3\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\n"
    (package / "DEBIAN" / "control").write_text(fields + "Description: photographs\n")
    (package / "usr").mkdir()
    (package / "usr" / "a.txt").write_text("a photograph")
    archive = repository / "photos_2.0-3_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", package, archive], check=True, capture_output=True)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    of_archive = f"Filename: ./{archive.name}\nSize: {archive.stat().st_size}\nSHA256: {digest}\n"
    (repository / "Packages").write_text(fields + of_archive + "Description: photographs\n")
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True)
    (state / "sources.list").write_text(f"deb [trusted=yes] file:{repository} ./\n")
    (state / "apt.conf").write_text(
        f'Dir::Etc::SourceList "{state}/sources.list";\nDir::Etc::SourceParts "/dev/null";\n'
        f'Dir::State::Lists "{state}/lists";\nDir::Cache "{state}/cache";\nAPT::Sandbox::User "";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(state / "apt.conf"))
    monkeypatch.chdir(tmp_path)
    subprocess.run(["apt-get", "update", "-qq"], check=True)
    wanted = {"name": "photos", "registry": "debian"}
    assert fetch_media.fetch_package(wanted, Path("packages")) == "1:2.0-3"
    assert Path("packages/photos/usr/a.txt").read_text() == "a photograph"


def test_what_cannot_be_had_is_one_line(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    (workplace / "wheels" / "photos-1.0-py3-none-any.whl").unlink()
    with pytest.raises(InputError, match=r"1 packages and 1 held-out .* \(photos, pip-z_again\).*run again") as caught:
        _fetch(workplace)
    assert "\n" not in str(caught.value)
    missing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing: ")]
    assert len(missing) == 1 and "package photos cannot be had: ERROR: No matching distribution" in missing[0]
    assert (workplace / "media" / "train" / "deb-a.png").exists()  # the others are there all the same


def test_a_changed_held_out_photograph_is_missing(workplace: Path) -> None:
    _write_json(workplace / "held_out.json", {"photographs": {"pip-p0": "0" * 64}})
    with pytest.raises(InputError, match="1 held-out photographs .* are missing .*pip-p0"):
        _fetch(workplace)
    assert not list((workplace / "media").glob("*/pip-p0.png"))


def test_the_shipped_list_is_of_the_shipped_catalogue() -> None:
    catalogue = json.loads((ROOT / "examples/tokenizer_proof/media.json").read_text())
    held_out = json.loads((ROOT / "examples/tokenizer_proof/held_out.json").read_text())["photographs"]
    keys = {group["key"] for package in catalogue["packages"] for group in package["groups"]}
    assert len(held_out) >= 24 and all(key.startswith(tuple(keys)) for key in held_out)

"""Tars as programs write them: links, sparse files, archives one behind the other, compressed ones."""

import bz2
import gzip
import io
import lzma
import os
import subprocess
import tarfile

import pyarrow
import pytest

from megatron_ext.config import InputError
from megatron_ext.media import Fault, build_index, list_samples, listing_of, parts_of
from tests.unit.media.test_index import silent


def entries(path):
    [part] = parts_of([path])
    return listing_of(part).entries(0, 1000)


def told(path):
    """What each sample holds, and why the others are none."""
    return {
        entry.key: entry.reason if isinstance(entry, Fault) else (entry.media.read(), *entry.captions())
        for entry in entries(path)
    }


def write(path, members, links=(), form=tarfile.PAX_FORMAT):
    """A tar of (name, content), then of (type, name, target)."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for kind, name, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    return path


HARD, SYMBOLIC = tarfile.LNKTYPE, tarfile.SYMTYPE


@pytest.mark.parametrize("prefix", ["", "./"])
def test_links_lead_to_the_bytes_of_their_targets(tmp_path, prefix):
    path = write(
        tmp_path / "a.tar",
        [(f"{prefix}d/0.jpg", b"picture"), (f"{prefix}d/0.txt", b"a fox"), (f"{prefix}blobs/f00", b"annexed")],
        [
            (HARD, f"{prefix}d/1.jpg", f"{prefix}d/0.jpg"),
            (SYMBOLIC, f"{prefix}d/1.txt", "0.txt"),
            (SYMBOLIC, f"{prefix}2.jpg", "d/1.jpg"),  # a link to a link
            (SYMBOLIC, f"{prefix}d/3.png", "../blobs/f00"),
            (SYMBOLIC, f"{prefix}d_again", "d"),  # a folder, whose files have names of their own
            (SYMBOLIC, f"{prefix}4.jpg", "5.jpg"),
            (HARD, f"{prefix}5.jpg", f"{prefix}d/0.jpg"),  # behind the link to it
        ],
    )
    expected = {
        "2": (b"picture",),
        "4": (b"picture",),
        "5": (b"picture",),
        "d/0": (b"picture", "a fox"),
        "d/1": (b"picture", "a fox"),
        "d/3": (b"annexed",),
    }
    assert told(path) == expected
    index = build_index([str(path)], None, silent)
    assert {index[number].key: (index[number].media.read(),) for number in range(len(index))} == {
        key: content[:1] for key, content in expected.items()
    }


def test_links_that_lead_nowhere_are_named(tmp_path):
    path = write(
        tmp_path / "a.tar",
        [("0.jpg", b"picture")],
        [
            (SYMBOLIC, "0.txt", "/elsewhere/0.txt"),
            (SYMBOLIC, "1.jpg", "../1.jpg"),
            (HARD, "2.jpg", "gone.jpg"),
            (SYMBOLIC, "3.jpg", "4.jpg"),
            (SYMBOLIC, "4.jpg", "3.jpg"),
            (SYMBOLIC, "linked", "../disk"),  # may have been a folder of pictures
            (SYMBOLIC, ".hidden", "gone"),
        ],
    )
    found = entries(path)
    assert [(entry.key, entry.source) for entry in found if isinstance(entry, Fault)] == [
        (key, f"{path}:{name}")
        for key, name in (("0", "0.txt"), ("1", "1.jpg"), ("2", "2.jpg"), ("3", "3.jpg"), ("4", "4.jpg"))
    ] + [("linked", f"{path}:linked")]
    assert found[0].media.read() == b"picture" and found[0].captions() == ()
    reasons = [entry.reason for entry in found if isinstance(entry, Fault)]
    assert reasons[:3] == [
        f"a link to {target!r}, which is not in the tar" for target in ("/elsewhere/0.txt", "../1.jpg", "gone.jpg")
    ]
    assert all("leads in a circle" in reason for reason in reasons[3:5]) and "'../disk'" in reasons[5]


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_files_that_gnu_tar_wrote(tmp_path, form):
    """Its links are found, and its sparse files are named as such."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "0.jpg").write_bytes(b"picture")
    os.link(folder / "0.jpg", folder / "1.jpg")
    (folder / "2.jpg").symlink_to("0.jpg")
    with (folder / "3.jpg").open("wb") as sparse:
        sparse.write(b"head")
        sparse.truncate(1 << 20)
        sparse.seek(0, os.SEEK_END)
        sparse.write(b"tail")
    (folder / "4.jpg").symlink_to("3.jpg")
    command = ["tar", "--sparse", f"--format={form}", "--sort=name", "-cf", tmp_path / "a.tar", "-C", folder, "."]
    subprocess.run(command, check=True)
    found = told(tmp_path / "a.tar")
    assert [found[key] for key in "012"] == [(b"picture",)] * 3
    assert [found[key].partition(",")[0] for key in "34"] == ["a sparse file"] * 2 and len(found) == 5


def test_archives_one_behind_the_other_are_read_on(tmp_path):
    parts = [write(tmp_path / f"{n}.tar", [(f"{n}.jpg", bytes([n])), (f"{n}.txt", b"x")]) for n in range(3)]
    whole = b"".join(part.read_bytes() for part in parts)
    path = tmp_path / "all" / "all.tar"
    path.parent.mkdir()
    path.write_bytes(whole + b"\0" * 5000)
    assert told(path) == {str(n): (bytes([n]), "x") for n in range(3)}
    assert [sample.media.read() for sample in list_samples([path])] == [b"\0", b"\1", b"\2"]

    path.write_bytes(whole + b"x" * 700)
    assert told(path) == {
        **{str(n): (bytes([n]), "x") for n in range(3)},
        "all": f"from byte {len(whole)} on, behind its end, it is no tar: what is there is not read",
    }
    path.write_bytes(whole[:-10240] + b"\0" * 1024 + b"x" * 700)  # the last archive is overwritten
    assert told(path)["all"].startswith(f"from byte {len(whole) - 9216} on")
    path.write_bytes(whole[: -10240 + 1536])
    assert told(path)["2"].startswith("the tar is cut off") and told(path)["1"] == (b"\1", "x")


def test_of_two_archives_with_one_key_the_first_is_used(tmp_path):
    parts = [write(tmp_path / f"{n}.tar", [("0.jpg", bytes([n])), ("0.txt", f"of {n}".encode())]) for n in range(2)]
    path = tmp_path / "all.tar"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    sample, fault = entries(path)
    assert (sample.media.read(), sample.captions()) == (b"\0", ("of 0",))
    assert fault.reason == f"two media files of one key: {path}:0.jpg is used"


def _zst(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "suffix, pack, tool",
    [
        ("gz", gzip.compress, "gunzip"),
        ("bz2", bz2.compress, "bunzip2"),
        ("xz", lzma.compress, "unxz"),
        ("zst", _zst, "unzstd"),
    ],
)
def test_a_compressed_tar_says_what_to_do(tmp_path, suffix, pack, tool):
    content = pack(write(tmp_path / "plain", [("0.jpg", b"x")]).read_bytes())
    for name in (f"a.tar.{suffix}", "b.tar"):
        (tmp_path / name).write_bytes(content)
    for given in (tmp_path / f"a.tar.{suffix}", tmp_path / "b.tar", f"{tmp_path}/*.tar*", f"{tmp_path}/a.*", tmp_path):
        with pytest.raises(InputError, match=rf"it is compressed, .*: unpack it once \({tool}\)"):
            list_samples([given])

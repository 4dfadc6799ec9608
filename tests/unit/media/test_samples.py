"""Listing of folders and tars."""

import io
import json
import tarfile

import pytest

from megatron_ext.config import InputError
from megatron_ext.media import Fault, MediaError, list_samples, listing_of, parts_of

FIELDS = {"caption": "A bee.", "url": "x", "caption_zh": "一只蜜蜂。", "captions": ["Bee"]}
FILES = {
    "00000/b.jpg": b"picture b",
    "00000/b.txt": b" A bee.\n",
    "00000/b.json": json.dumps(FIELDS).encode(),
    "00000/b.mask.png": b"not the picture",
    "00000/a.mp4": b"clip a",
    "00000_stats.json": b"{}",
    "c.v1.png": b"picture c",
}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    return tmp_path / "in"


@pytest.fixture
def shard(tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name, content in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return tmp_path / "shard.tar"


@pytest.mark.parametrize("place", ["folder", "shard"])
def test_folder_and_tar_give_the_same_samples(place, request):
    samples = list_samples([request.getfixturevalue(place)])
    assert [(s.key, s.kind) for s in samples] == [("00000/a", "video"), ("00000/b", "image"), ("c", "image")]
    assert [s.media.read() for s in samples] == [b"clip a", b"picture b", b"picture c"]
    assert [s.captions() for s in samples] == [(), ("A bee.", "一只蜜蜂。", "Bee"), ()]


def test_tar_is_readable_by_webdataset_under_the_same_keys(shard):
    import webdataset

    keys = sorted(item["__key__"] for item in webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False))
    assert set(keys) >= {sample.key for sample in list_samples([shard])}


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b'{"caption": "half \\ud83d"}'])
def test_bad_captions_are_a_media_error(folder, content):
    (folder / "00000/b.json").write_bytes(content)
    sample = next(s for s in list_samples([folder]) if s.key == "00000/b")
    with pytest.raises(MediaError):
        sample.captions()


def test_bad_inputs_are_refused(folder, shard, tmp_path):
    with pytest.raises(InputError, match="missing"):
        list_samples([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="keys must be unique"):
        list_samples([folder, shard])
    (folder / "00000/b.png").write_bytes(b"")
    with pytest.raises(InputError, match="two media files"):
        list_samples([folder])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no picture"):
        list_samples([tmp_path / "empty"])
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    with pytest.raises(InputError, match="not an uncompressed tar"):
        list_samples([tmp_path / "broken.tar"])


def entries(path):
    [part] = parts_of([path])
    listing = listing_of(part)
    return listing.entries(0, len(listing))


def kinds(path):
    """Keys of samples, and key: reason of faults."""
    return [entry.key if not isinstance(entry, Fault) else f"{entry.key}: {entry.reason}" for entry in entries(path)]


def test_a_tar_that_is_cut_off_keeps_what_is_whole(shard):
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        members = {member.name: member for member in tar}
    cut = "the tar is cut off: this sample may lack files, and what followed is lost"
    ends = {
        members["00000/a.mp4"].offset_data + 3: ["00000/b", f"00000/a: {cut}"],  # within a file
        members["00000_stats.json"].offset: ["00000/b", f"00000/a: {cut}"],  # behind a sample: no end mark
        members["c.v1.png"].offset + 100: ["00000/a", "00000/b", f"00000_stats: {cut}"],  # within a header
        members["00000/b.txt"].offset_data: [f"00000/b: {cut}"],
        300: ["shard: it is not an uncompressed tar (truncated header)"],
        0: ["shard: it is not an uncompressed tar (empty file)"],
    }
    for end, expected in ends.items():
        shard.write_bytes(whole[:end])
        assert kinds(shard) == expected, end
        with pytest.raises(InputError, match=r"shard.tar"):
            list_samples([shard])


def test_a_tar_that_is_damaged_in_the_middle_keeps_what_is_before(shard):
    whole = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        offset = tar.getmember("00000_stats.json").offset
    whole[offset : offset + 512] = b"x" * 512
    shard.write_bytes(whole)
    good, fault = kinds(shard)
    assert good == "00000/b" and fault.startswith(f"00000/a: the tar is damaged at byte {offset}: ")


def test_a_tar_that_cannot_be_read_is_a_fault(shard, tmp_path, monkeypatch):
    (tmp_path / "mem.tar").symlink_to("/proc/self/mem")  # opens, and cannot be read
    assert kinds(tmp_path / "mem.tar") == ["mem: unreadable (Input/output error)"]
    with pytest.raises(InputError, match=r"mem.tar: unreadable \(Input/output error\)"):
        list_samples([tmp_path / "mem.tar"])
    following = tarfile.TarFile.next

    def fails_behind_five_members(tar):
        if tar.offset >= 5 * 2 * tarfile.BLOCKSIZE:
            raise OSError(5, "Input/output error")
        return following(tar)

    monkeypatch.setattr(tarfile.TarFile, "next", fails_behind_five_members)
    good, fault = kinds(shard)
    assert good == "00000/b" and fault.startswith("00000/a: the tar is unreadable (Input/output error): ")


def test_of_two_media_files_of_one_key_the_first_is_used(folder):
    (folder / "00000/b.png").write_bytes(b"")
    first, second, fault, third = entries(folder)
    assert [first.key, second.key, third.key] == ["00000/a", "00000/b", "c"]
    assert second.media.read() == b"picture b" and fault.source.endswith("b.png")
    assert fault.reason.startswith("two media files of one key: ") and fault.reason.endswith("b.jpg is used")


def test_a_file_that_has_shrunk_is_a_media_error(folder):
    sample = next(s for s in list_samples([folder]) if s.key == "00000/b")
    (folder / "00000/b.jpg").write_bytes(b"pic")
    with pytest.raises(MediaError, match="ends after 3 of 9 bytes"):
        sample.media.read()

"""Listing of folders and tars."""

import io
import json
import tarfile

import pytest

from megatron_ext.config import InputError
from megatron_ext.media import MediaError, list_samples

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

"""Keys and members of WebDataset tars: what is written comes out of a reader as it went in."""

import tarfile

import pytest

from megatron_ext.media import list_samples
from megatron_ext.media.members import add_member, key_of, media_suffix, stem_of

PLAIN = ["a", "00000/b", "a.b/c", "ä/猫", "100%", "%20", "/root/a", "../a", "a//b", "a%2e"]
ESCAPED = {
    "img_0001.jpg": "img_0001%2Ejpg",
    "cat.001": "cat%2E001",
    "sub.d/100%.x": "sub%2Ed/100%25%2Ex",
    "a%2Eb": "a%252Eb",
    "a%252Eb": "a%25252Eb",
    ".hidden": "%2Ehidden",
    "./a": "%2E/a",
    "a/": "a%2F",
    "n\0": "n%00",
}


def test_keys_survive_a_tar(tmp_path):
    assert {key: stem_of(key) for key in PLAIN} == {key: key for key in PLAIN}
    assert {key: stem_of(key) for key in ESCAPED} == ESCAPED
    keys = [*PLAIN, *ESCAPED]
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        places = []
        for key in keys:
            places.append(add_member(tar, f"{stem_of(key)}.jpg", b"media of " + key.encode()))
            add_member(tar, f"{stem_of(key)}.txt", key.encode())
    content = (tmp_path / "a.tar").read_bytes()
    assert all(content[place:].startswith(b"media of " + key.encode()) for place, key in zip(places, keys, strict=True))
    samples = {sample.key: sample for sample in list_samples([tmp_path / "a.tar"])}
    assert set(samples) == set(keys)
    for key, sample in samples.items():
        assert sample.media.read() == b"media of " + key.encode()
        assert [key.strip()] == [caption for caption in sample.captions()]


@pytest.mark.parametrize("name", ["a%2Eb%.jpg", "%25x%.jpg", "a%20b%2Ec.jpg"])
def test_what_only_looks_escaped_stays(name):
    assert key_of(name) == name.removesuffix(".jpg")


def test_a_suffix_says_the_kind():
    assert media_suffix("image", "https://host/x", "/in/a.PNG") == "png"
    assert media_suffix("image", "https://host/x.webp", "/in/a.png") == "webp"
    assert media_suffix("image", "https://host/x", "/in/00000.tar") == "jpg"
    assert media_suffix("video", "a.jpg", "b.tar") == "mp4"

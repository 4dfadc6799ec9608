"""Which files make a sample, and what a folder holds."""

import os

import pytest

from megatron_ext.config import InputError
from megatron_ext.media import Fault, MediaError, list_samples, listing_of, parts_of
from tests.support.tars import write_tar
from tests.support.without_rights import open_folder, without_rights


def folder_of(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def entries(path):
    return [entry for part in parts_of([path]) for entry in listing_of(part).entries(0, 1000)]


def samples(path):
    """(key, content, captions) of samples, (key, reason) of the others."""
    return [
        (entry.key, entry.reason) if isinstance(entry, Fault) else (entry.key, entry.media.read(), *entry.captions())
        for entry in entries(path)
    ]


MANY = {"m0.jpg": b"the picture", "m0.left.jpg": b"left", "m0.right.jpg": b"r", "m0.seg.png": b"mask", "m0.txt": b"cap"}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("write", [folder_of, write_tar])
def test_beside_a_picture_others_of_its_key_are_something_else(tmp_path, write, order):
    path = write(tmp_path / "a.tar", dict(list(MANY.items())[::order]))
    assert samples(path) == [("m0", b"the picture", "cap")]


def test_of_several_pictures_of_a_key_alone_a_tar_has_one_sample_a_folder_several(tmp_path):
    files = {name: content for name, content in MANY.items() if name != "m0.jpg"} | {"m0.seg.txt": b"of the mask"}
    path = write_tar(tmp_path / "a.tar", files)
    used, *faults = samples(path)
    assert used == ("m0", b"left", "cap")
    assert faults == [("m0", f"two media files of one key: {path}:m0.left.jpg is used")] * 2
    assert samples(folder_of(tmp_path / "in", files)) == [
        ("m0.left", b"left", "cap"),
        ("m0.right", b"r", "cap"),
        ("m0.seg", b"mask", "of the mask"),
    ]


def test_names_with_dots_have_captions_of_their_own(tmp_path):
    files = {"22.05.jpg": b"5", "22.05.txt": b"may", "22.06.JPG": b"6", "22.06.json": b'{"caption": "june"}'}
    folder = folder_of(tmp_path / "in", files)
    assert samples(folder) == [("22.05", b"5", "may"), ("22.06", b"6", "june")]
    assert samples(folder / "22.05.jpg") == [("22", b"5", "may")], "one by one"
    assert samples(folder_of(tmp_path / "one", {"o0.image.jpg": b"o", "o0.caption.txt": b"cap"})) == [
        ("o0", b"o", "cap")
    ]
    rows = folder / "rows.jsonl"
    rows.write_text('{"path": "22.05.jpg"}\n{"path": "22.06.JPG"}')
    assert samples(rows) == [("22", b"5", "may"), ("22", b"6", "june")]


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    mark = "\ufeff".encode()
    files = {
        "a.jpg": b"a",
        "a.txt": mark + b"a red fox",
        "b.jpg": b"b",
        "b.json": mark + b'{"caption": "b"}',
        "c.jpg": b"c",
        "c.txt": mark,
        "rows.jsonl": mark + b'{"path": "a.jpg"}\n{"path": "b.jpg"}\n',
    }
    folder = folder_of(tmp_path, files)
    expected = [("a", b"a", "a red fox"), ("b", b"b", "b"), ("c", b"c")]
    assert samples(folder) == expected and samples(folder / "rows.jsonl") == expected[:2]


def test_json_nested_too_deep_costs_its_sample(tmp_path):
    deep = b'{"caption": "x", "y": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"
    rows = b'{"path": "a.jpg"}\n' + deep.replace(b"caption", b"path") + b"\n"
    folder = folder_of(tmp_path, {"a.jpg": b"a", "b.jpg": b"b", "b.json": deep, "rows.jsonl": rows})
    one, two = entries(folder)
    assert one.captions() == ()
    with pytest.raises(MediaError, match="its captions are unreadable: it is nested deeper than"):
        two.captions()
    place = f"{tmp_path}/rows.jsonl#2"
    assert samples(folder / "rows.jsonl")[1:] == [(place, "the row is no JSON object in UTF-8")]


def test_a_folder_is_searched_through_links(tmp_path):
    folder = folder_of(tmp_path / "in", {"a.jpg": b"a"})
    folder_of(tmp_path / "elsewhere", {"b.jpg": b"b", "b.txt": b"cap", "deep/d.jpg": b"d"})
    for link, target in (
        ("linked", "../elsewhere"),
        ("c.jpg", "../elsewhere/b.jpg"),
        ("circle", "."),
        ("lost", "../unmounted"),
        ("lost.jpg", "gone.jpg"),
        ("lost.txt", "gone.txt"),
        ("lost.md", "gone.md"),
        (".hidden.jpg", "gone.jpg"),
    ):
        (folder / link).symlink_to(target)
    os.mkfifo(folder / "pipe.jpg")
    nowhere = "a link that leads nowhere (No such file or directory)"
    assert samples(folder) == [
        ("a", b"a"),
        ("c", b"b"),
        ("linked/b", b"b", "cap"),
        ("linked/deep/d", b"d"),
        *[("lost", nowhere)] * 4,
        ("pipe", "it is no file"),
    ]


def test_a_folder_that_cannot_be_searched_is_named():
    with open_folder() as folder:
        folder_of(folder, {"a.jpg": b"a", "closed/b.jpg": b"b"})
        (folder / "closed").chmod(0)
        with without_rights():
            assert samples(folder) == [("a", b"a"), ("closed/", "the folder cannot be searched (Permission denied)")]
            with pytest.raises(InputError, match=r"closed' cannot be searched \(Permission denied\)"):
                entries(folder / "closed")


def test_the_tars_of_a_folder_are_read(tmp_path):
    shards = tmp_path / "shards"
    for number in range(2):
        write_tar(shards / "deep" / f"0000{number}.tar", {f"{number}.jpg": b"x", f"{number}.txt": b"cap"})
        (shards / "deep" / f"0000{number}_stats.json").write_text("{}")
    (shards / "00000.parquet").write_bytes(b"img2dataset's own")
    (shards / "._00000.jpg").write_bytes(b"of a Mac")
    (shards / "._00000.tar").write_bytes(b"of a Mac")
    assert [part.layout for part in parts_of([shards])] == ["tar", "tar"]
    assert samples(shards) == [("0", b"x", "cap"), ("1", b"x", "cap")] == samples(f"{tmp_path}/sha*")
    (shards / "deep" / "00002.tar").symlink_to("gone.tar")
    assert samples(shards)[0] == ("deep/00002", "a link that leads nowhere (No such file or directory)")
    with pytest.raises(InputError, match=r"00002.tar is a link that leads nowhere"):
        entries(f"{shards}/deep/*.tar")
    (shards / "deep" / "00002.tar").unlink()
    folder_of(shards, {"own.jpg": b"own"})
    assert [part.layout for part in parts_of([shards])] == ["folder", "tar", "tar"]
    assert [sample.key for sample in list_samples([shards])] == ["own", "0", "1"]
    with pytest.raises(InputError, match="holds no picture, no clip and no tar"):
        entries(folder_of(tmp_path / "none", {"a.md": b""}))

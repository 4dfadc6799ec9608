"""A name on the disk comes before a pattern; searches follow links, once, and tell what they cannot read."""

import glob
import os

import pytest

from megatron_ext.config import InputError
from megatron_ext.files import files_named, named, suffix_of, walk
from tests.support.without_rights import open_folder, without_rights


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def found(pattern):
    return [path.as_posix() for path in named(pattern, "text")]


def test_brackets_in_names_need_no_escapes(place):
    made(place, "corpus [v1].txt", "[2023] photos/a [1].tar", "[2023] photos/b.tar", "x/[2023] photos/c.tar", "v", "1")
    assert found("corpus [v1].txt") == ["corpus [v1].txt"]
    assert found(f"{place}/corpus [v1].txt") == [f"{place}/corpus [v1].txt"]
    assert found("[2023] photos/*.tar") == ["[2023] photos/a [1].tar", "[2023] photos/b.tar"]
    assert found("[2023] photos/a [1].tar") == ["[2023] photos/a [1].tar"]
    assert found("*/[2023] photos/*.tar") == ["x/[2023] photos/c.tar"]
    assert found("[v1]") == ["1", "v"], "a pattern where no file has the name"
    assert found("[[]2023] photos/b.*") == ["[2023] photos/b.tar"], "escapes still work"


@pytest.mark.parametrize(
    "pattern",
    [
        "*",
        "**",
        "a/*",
        "a/**",
        "**/*.txt",
        "*/*",
        "a/**/c.*",
        "./a/?.txt",
        "a//b/*",
        "*/",
        ".h*",
        ".hidden/*",
        "../*/a",
    ],
)
def test_patterns_match_what_those_of_glob_do(place, pattern):
    made(place / "in", "a/b.txt", "a/b/c.txt", "a/b/c.md", "a/b/d/e.txt", "f.txt", ".hidden/g.txt", "a/.h.txt")
    os.chdir(place / "in")
    expected = {os.path.normpath(match) for match in glob.glob(pattern, recursive=True)}
    assert {os.path.normpath(path) for path in named(pattern, "text")} == expected


def test_what_is_not_there_is_told_with_the_reason(place):
    made(place, "folder/a.txt")
    (place / "lost.txt").symlink_to("gone")
    for pattern, message in (
        ("corpus.txt", r"text 'corpus.txt' is missing \(No such file or directory\): check the path, relative to /"),
        ("x" * 300, r"is missing \(File name too long\)"),
        ("n\0", r"is missing \(.*null"),
        ("corpus [v1].txt", r"matches no file and no folder: no file has this name, and taken as a pattern \(`\*`"),
        ("lost.txt", "is missing"),
    ):
        with pytest.raises(InputError, match=message):
            named(pattern, "text")
    with pytest.raises(InputError, match="text .* matches no file, folders alone: name their files, as in FOLDER/"):
        files_named("fol*", "text")
    with pytest.raises(InputError, match=r"text 'l\*': lost.txt is a link that leads nowhere"):
        files_named("l*", "text")


def searched(folder):
    return sorted(
        (place / file.name).relative_to(folder).as_posix() for place, files in walk(folder, print) for file in files
    )


def test_links_are_followed_and_each_folder_is_searched_once(place):
    made(place, "in/a.jpg", "in/z/b.jpg", "out/c.jpg", "out/deep/d.jpg")
    for link, target in (
        ("in/again", "z"),  # also found under its own name
        ("in/linked", "../out"),
        ("in/linked_too", "../out"),
        ("in/circle", "."),
        ("out/back", "../in"),
        ("in/self", "self"),
        ("in/a_link.jpg", "a.jpg"),
    ):
        (place / link).symlink_to(target)
    expected = ["a.jpg", "a_link.jpg", "linked/c.jpg", "linked/deep/d.jpg", "self", "z/b.jpg"]
    assert searched(place / "in") == expected
    (place / "entry").symlink_to("in")
    assert searched(place / "entry") == expected
    assert found("in/**/*.jpg") == [f"in/{name}" for name in expected if name != "self"]


def test_folders_that_cannot_be_read_are_told():
    with open_folder() as folder:
        made(folder, "a/b.txt", "closed/c.txt", "lost+found/d.txt")
        for name in ("closed", "lost+found"):
            (folder / name).chmod(0)
        told = []
        with without_rights():
            assert [place.name for place, _ in walk(folder, lambda *which: told.append(which))] == [folder.name, "a"]
            with pytest.raises(InputError, match=r"text: cannot search folder .*closed \(Permission denied\)"):
                named(f"{folder}/**/*.txt", "text")
            with pytest.raises(InputError, match=r"text: cannot search folder .*closed \(Permission denied\)"):
                named(f"{folder}/clo*/*.txt", "text")
        assert [(place.name, error.strerror) for place, error in told] == [("closed", "Permission denied")]


def test_suffixes_are_told_in_small_letters():
    names = ("a.JSONL", "a.jsonl.GZ", "b.c/d", "b.c/tar", ".hidden", "a.")
    assert [suffix_of(name) for name in names] == ["jsonl", "gz", "", "", "hidden", ""]

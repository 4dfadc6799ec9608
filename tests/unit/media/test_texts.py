"""Text corpora in every format give the same documents; damage is one line."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_ext.config import InputError
from megatron_ext.media.texts import BadText, find_text_files, read_rows, read_texts

TEXTS = ["a document\n\nof two", "一份文件 🦊", " ", "last"]
JSON_LINES = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(TEXTS)).encode()


def _zst(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def _read(path: Path, content: bytes | None = None, **options: str) -> list[tuple[str, str] | BadText]:
    """All documents; every byte of the file is reported as read."""
    if content is not None:
        path.write_bytes(content)
    done: list[int] = []
    found = list(read_texts(path, options.pop("unit", "line"), done.append, **options))
    assert sum(done) == path.stat().st_size
    return found


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    table = pyarrow.table({"id": range(4), "text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    paths = [tmp_path / "a.parquet"]
    for name, content in (
        ("a.jsonl", JSON_LINES),
        ("a.jsonl.gz", gzip.compress(JSON_LINES)),
        ("a.json.gz", gzip.compress(JSON_LINES[:40]) + gzip.compress(JSON_LINES[40:])),
        ("a.ndjson.zst", _zst(JSON_LINES)),
    ):
        (tmp_path / name).write_bytes(content)
        paths.append(tmp_path / name)
    for path in paths:
        assert _read(path) == [(f"{path}#{number}", text) for number, text in enumerate(TEXTS, 1)], path.name


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress), (".zst", _zst)])
def test_units_of_plain_text(tmp_path: Path, suffix: str, pack) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack("one\r\ntwo\n\n\n三\n".encode()))
    texts = {unit: [text for _, text in _read(path, unit=unit)] for unit in ("line", "paragraph", "file")}
    assert texts == {"line": ["one", "two", "三"], "paragraph": ["one\r\ntwo", "三"], "file": ["one\r\ntwo\n\n\n三\n"]}


def test_a_suffix_counts_in_any_case(tmp_path: Path) -> None:
    table = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "UP.PARQUET")
    for name, content in (
        ("UPPER.JSONL", JSON_LINES),
        ("X.Jsonl.GZ", gzip.compress(JSON_LINES)),
        ("X.NDJSON.Zst", _zst(JSON_LINES)),
        ("UP.PARQUET", None),
    ):
        assert [text for _, text in _read(tmp_path / name, content)] == TEXTS, name
    (tmp_path / "ROWS.JSONL").write_text('{"content": ["x"]}\n')
    ((_, row),) = read_rows(tmp_path / "ROWS.JSONL", ["content"], lambda count: None)
    assert row == {"content": ["x"]}


@pytest.mark.parametrize("values", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()], ids=str)
def test_strings_are_read_however_a_parquet_file_stores_them(tmp_path: Path, values: pyarrow.DataType) -> None:
    kinds = [values] if values == pyarrow.string_view() else [values, pyarrow.dictionary(pyarrow.int32(), values)]
    for kind in kinds:
        table = pyarrow.table({"text": pyarrow.array([*TEXTS, None], pyarrow.string()).cast(kind)})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        *read, bad = _read(tmp_path / "a.parquet")
        assert [text for _, text in read] == TEXTS and isinstance(bad, BadText), kind


def test_another_field(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"], "n": [1]}), tmp_path / "a.parquet")
    assert _read(tmp_path / "a.parquet", field="content") == [(f"{tmp_path}/a.parquet#1", "x")]
    assert _read(tmp_path / "a.jsonl", b'{"content": "x"}', field="content") == [(f"{tmp_path}/a.jsonl#1", "x")]
    for field, found in (("text", r"content \(string\), n \(int64\)"), ("n", "no column 'n' of strings")):
        with pytest.raises(InputError, match=found):
            _read(tmp_path / "a.parquet", field=field)


def test_bad_documents_are_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["fine", None]}), tmp_path / "a.parquet")
    assert _read(tmp_path / "a.parquet")[1] == BadText(f"{tmp_path}/a.parquet:2", "no string in field text")
    rows = b'{"text": "half \\ud83d"}\n\n{"text": 1}\n[1]\n{'
    found = _read(tmp_path / "a.jsonl.gz", gzip.compress(rows))
    assert [bad.place.rpartition(":")[2] for bad in found] == ["1", "3", "4", "5"]
    assert isinstance(_read(tmp_path / "a.txt.zst", _zst(b"caf\xe9"))[0], BadText)


def test_json_nested_too_deep_is_a_bad_document(tmp_path: Path) -> None:
    lines = [b'{"text": "x", "y": ' + b"[" * depth + b"]" * depth + b"}" for depth in (100, 700, 900, 20_000)]
    path = tmp_path / "a.jsonl"
    first, *deep = _read(path, b"\n".join(lines))
    assert first == (f"{path}#1", "x") and [bad.place for bad in deep] == [f"{path}:{line}" for line in (2, 3, 4)]
    assert [isinstance(row, BadText) for row in read_rows(path, ["text"], lambda count: None)] == [False, *[True] * 3]


def test_files_are_found_by_name_before_by_pattern(tmp_path: Path) -> None:
    for name in ("corpus [v1].txt", "corpus v.txt"):
        (tmp_path / name).write_text("x")
    patterns = [f"{tmp_path}/corpus [v1].txt", f"{tmp_path}/*.txt"]
    assert find_text_files(patterns[:1]) == [tmp_path / "corpus [v1].txt"]
    assert [path.name for path in find_text_files(patterns)] == ["corpus [v1].txt", "corpus v.txt"]
    with pytest.raises(InputError, match="rows '.*' matches no file, folders alone: name their files, as in FOLDER"):
        find_text_files([str(tmp_path)], option="rows")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt.gz", gzip.compress(b"line\n" * 1000)[:40], "Compressed file ended"),
        ("a.txt.gz", b"line", "Not a gzipped file"),
        ("a.txt.zst", _zst(b"line\n" * 1000)[:-8], "Truncated"),
        ("a.txt.zst", b"line" * 9, "ZSTD decompress failed"),
        ("a.parquet", b"PAR1" * 9, "Parquet"),
        ("none.txt", None, "No such file"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_texts(path, "line", lambda count: None))
    assert str(caught.value).startswith(f"cannot read text {path}: ") and "\n" not in str(caught.value)

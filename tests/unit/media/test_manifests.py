"""Tables that name samples: JSON lines and Parquet."""

import json
import tarfile
import timeit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ext.config import InputError
from megatron_ext.media import Fault, MediaError, build_index, list_samples, listing_of, parts_of
from megatron_ext.media.samples import Extent


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("sub/a.jpg", "b.jpg", "c.v2.png"):
        (tmp_path / name).write_bytes(f"picture {name}".encode())
    (tmp_path / "b.txt").write_text("Beside.")
    (tmp_path / "b.json").write_text('{"caption_zh": "旁边"}', encoding="utf-8")
    with tarfile.open(tmp_path / "m.tar", "w") as tar:
        tar.add(tmp_path / "b.jpg", "inside.jpg")
    return tmp_path


def rows(folder):
    with tarfile.open(folder / "m.tar") as tar:
        offset = tar.getmember("inside.jpg").offset_data
    place = {"path": str(folder / "m.tar"), "source": f"{folder / 'm.tar'}:inside.jpg", "offset": offset, "size": 13}
    return [
        {"path": "sub/a.jpg", "key": "first", "caption": "A.", "caption_zh": "甲", "verdict": "kept"},
        {"path": "b.jpg"},
        {"path": "b.jpg", "verdict": "dropped"},
        {**place, "key": "in tar", "captions": ["One.", "Two."], "kind": "image"},
        {"path": "c.v2.png", "captions": []},
        {"path": "gone.jpg"},
        {"path": "b.txt"},
        {"key": "no path"},
    ]


def write_json(folder):
    path = folder / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows(folder)]
    path.write_text("\n".join(lines) + "\n\n{broken\n", encoding="utf-8")
    return path


def write_parquet(folder):
    path = folder / "rows.parquet"
    names = ("path", "key", "kind", "source", "caption", "caption_zh", "verdict")
    columns = {name: pa.array([row.get(name) for row in rows(folder)], pa.string()) for name in names}
    columns |= {name: pa.array([row.get(name) for row in rows(folder)], pa.int64()) for name in ("offset", "size")}
    columns["captions"] = pa.array([row.get("captions") for row in rows(folder)], pa.list_(pa.string()))
    columns["score"] = pa.array([0.5] * len(rows(folder)))
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


@pytest.mark.parametrize("write", [write_json, write_parquet])
def test_rows_name_samples(folder, write):
    path = write(folder)
    [part] = parts_of([path])
    listing = listing_of(part)
    entries = listing.entries(0, len(listing))
    samples = [entry for entry in entries if not isinstance(entry, Fault)]
    assert [sample.key for sample in samples] == ["first", "b", "in tar", "c"]
    assert [sample.media.read() for sample in samples] == [
        b"picture sub/a.jpg",
        b"picture b.jpg",
        b"picture b.jpg",
        b"picture c.v2.png",
    ]
    assert [sample.captions() for sample in samples] == [("A.", "甲"), ("Beside.", "旁边"), ("One.", "Two."), ()]
    assert samples[2].source.endswith("m.tar:inside.jpg") and {sample.kind for sample in samples} == {"image"}
    faults = [(entry.key, entry.reason) for entry in entries if isinstance(entry, Fault)]
    assert faults[0][0] == "gone" and "No such file" in faults[0][1] and f"{path}#6" in faults[0][1]
    assert faults[1][0] == "b" and "neither column kind nor the suffix" in faults[1][1]
    assert faults[2] == (f"{path}#8", "the row has no string in column path")
    if write is write_json:
        assert faults[3] == (f"{path}#10", "the row is no JSON object in UTF-8")
    pieces = [entry for first in range(0, len(listing), 2) for entry in listing.entries(first, first + 2)]
    assert pieces == entries


def test_rows_of_parquet_are_found_among_any_row_groups(folder):
    path = folder / "groups.parquet"
    paths = pa.table({"path": [str(folder / "b.jpg")] * 7, "key": list("abcdefg")})
    with pq.ParquetWriter(path, paths.schema) as writer:
        for first, stop in ((0, 0), (0, 2), (2, 3), (3, 3), (3, 6), (6, 7), (7, 7)):
            writer.write_table(paths.slice(first, stop - first))
    [part] = parts_of([path])
    listing = listing_of(part)
    assert len(listing) == 7
    for first in range(8):
        for stop in range(first, 9):
            found = "".join(entry.key for entry in listing.entries(first, stop))
            assert found == "abcdefg"[first:stop], (first, stop)
    pq.write_table(paths.slice(0, 0), path)
    empty = listing_of(part)
    assert len(empty) == 0 and empty.entries(0, 5) == []


def test_a_row_costs_the_same_among_many_row_groups(folder):
    def seconds(row_group_size):
        path = folder / f"{row_group_size}.parquet"
        pq.write_table(pa.table({"path": [str(folder / "b.jpg")] * 5000}), path, row_group_size=row_group_size)
        listing = listing_of(parts_of([path])[0])
        return min(timeit.repeat(lambda: listing.entries(4999, 5000), number=50, repeat=5))

    # Measured 1.0, and 32 when every group is looked at.
    assert seconds(1) < 4 * seconds(5000)


def test_what_no_manifest_can_hold(folder):
    path = folder / "rows.jsonl"
    path.write_text(
        '{"path": "sub/a.jpg", "key": "half \\ud83d", "caption": "\\ud83d"}\n'
        '{"path": "a\\u0000.jpg"}\n{"path": "b.jpg", "offset": -1, "size": 3}\n[1]\n'
    )
    [part] = parts_of([path])
    sample, *faults = listing_of(part).entries(0, 4)
    assert (sample.key, sample.captions()) == ("half \\ud83d", ("\\ud83d",))
    assert [fault.reason.partition(" (")[0] for fault in faults[:2]] == ["cannot be read"] * 2
    assert "no JSON object" in faults[2].reason


def test_source_and_kind_of_a_row(folder):
    """A source may be anything; without one a place in a tar is named."""
    path = folder / "rows.jsonl"
    rows_ = [
        {"path": "b.jpg", "source": "laion2b"},
        {"path": "b.jpg", "source": 7},
        {"path": "m.tar", "source": "https://x.org/film.MP4", "offset": 512, "size": 3},
        {"path": "m.tar", "kind": "image", "offset": 512, "size": 3},
        {"path": "m.tar", "source": ["x"], "offset": 512, "size": 3},
    ]
    path.write_text("\n".join(map(json.dumps, rows_)))
    *samples, fault = listing_of(*parts_of([path])).entries(0, len(rows_))
    assert [(sample.source, sample.kind) for sample in samples] == [
        ("laion2b", "image"),
        ("b.jpg", "image"),
        ("https://x.org/film.MP4", "video"),
        ("m.tar:512", "image"),
    ]
    assert fault.source == "m.tar:512" and "neither column kind nor the suffix" in fault.reason


def test_bad_manifests_are_refused(folder, tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"cannot read manifest .*x.parquet"):
        list_samples([path])
    pq.write_table(pa.table({"url": ["x"]}), path)
    with pytest.raises(InputError, match=r"x.parquet has no column path, and none of bytes named jpg, .*; it has url"):
        list_samples([path])
    with pytest.raises(InputError, match=r"rows.jsonl' is a manifest.*OUTPUT/kept/\*.tar"):
        build_index([str(write_json(folder))], None, lambda *_: None)


def test_a_damaged_page_is_named_with_its_file(folder):
    path = folder / "rows.PARQUET"
    rows = 1000
    paths = pa.table({"path": [f"{number:040}.jpg" for number in range(rows)]})
    pq.write_table(paths, path, compression="none", use_dictionary=False, row_group_size=rows)
    whole = bytearray(path.read_bytes())
    at = whole.index(b"%040d.jpg" % 500) - 4
    whole[at : at + 4] = b"\xff\xff\xff\x7f"  # the length of a string
    path.write_bytes(whole)
    listing = listing_of(parts_of([path])[0])
    with pytest.raises(InputError, match=r"cannot read manifest .*rows.PARQUET: ") as caught:
        listing.entries(0, 1)
    assert "\n" not in str(caught.value)
    path.unlink()
    gone = listing_of(parts_of([write_json(folder)])[0])
    (folder / "rows.jsonl").unlink()
    with pytest.raises(InputError, match=r"cannot read manifest .*rows.jsonl: No such file"):
        gone.entries(0, 1)


def test_strings_are_read_however_a_manifest_stores_them(folder):
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        columns = {name: pa.array(["b.jpg"], pa.string()).cast(kind) for name in ("path", "caption")}
        pq.write_table(pa.table(columns), folder / "rows.parquet")
        [sample] = listing_of(parts_of([folder / "rows.parquet"])[0]).entries(0, 1)
        assert (sample.key, sample.captions()) == ("b", ("b.jpg",)), kind


def test_pictures_in_the_rows_of_a_parquet_file(folder):
    """img2dataset's `parquet` output, and a table of curation that refers to it."""
    path = folder / "00000.parquet"
    columns = {
        "url": ["x"] * 5,
        "key": ["000000000", "000000001", None, "000000003", "000000004"],
        "caption": ["A fox.", "gone", "", None, "last"],
        "status": ["success", "failed_to_download", "success", "success", "success"],
        "jpg": [b"one", None, b"three", b"four", b"five and more"],
    }
    pq.write_table(pa.table(columns), path, row_group_size=2, compression="none", use_dictionary=False)
    [part] = parts_of([str(path)])
    listing = listing_of(part)
    samples = listing.entries(0, 9)
    assert [(sample.key, sample.captions()) for sample in samples] == [
        ("000000000", ("A fox.",)),
        ("00000-3", ()),
        ("000000003", ()),
        ("000000004", ("last",)),
    ]
    contents = [b"one", b"three", b"four", b"five and more"]
    for order in (1, -1):
        assert [sample.media.read() for sample in samples[::order]] == contents[::order]
    assert [sample.media.open().read() for sample in samples] == contents
    assert [(sample.media.offset, sample.media.size) for sample in samples] == [(0, 3), (2, 5), (3, 4), (4, 13)]
    assert samples[1].source == f"{path}#3" and {sample.kind for sample in samples} == {"image"}
    assert [entry for first in range(5) for entry in listing.entries(first, first + 1)] == samples

    (folder / "rows.jsonl").write_text(
        "\n".join(json.dumps({"path": str(path), "kind": "image", "offset": row, "size": 4}) for row in (3, 9))
    )
    one, other = list(listing_of(parts_of([folder / "rows.jsonl"])[0]).entries(0, 2))
    assert one.media.read() == b"four"
    with pytest.raises(MediaError, match="00000.parquet has no row 9 with a picture or clip"):
        other.media.read()
    whole = bytearray(path.read_bytes())
    at = whole.index(b"\3\0\0\0one")
    whole[at : at + 4] = b"\xff\xff\xff\x7f"  # the length of the first picture
    path.write_bytes(whole)
    with pytest.raises(MediaError, match="cannot read pictures of .*00000.parquet"):
        Extent(path=path, offset=0, size=3, stamp=7).read()


def test_a_pattern_takes_manifests_only_by_their_suffix(folder):
    write_parquet(folder)
    assert [part.layout for part in parts_of([folder / "*"])] == ["media", "tar", "folder"]
    assert [part.layout for part in parts_of([folder / "*.parquet"])] == ["manifest"]
    assert len(parts_of([folder / "*.tar", folder / "m.tar", folder / "b.jpg", folder / "c.v2.png"])) == 2

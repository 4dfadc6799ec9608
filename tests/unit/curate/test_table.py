"""The table grows by parts that are complete or absent."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ext.config import InputError
from megatron_ext.curate.table import PartTable, schema_of

SCHEMA = schema_of([pa.field("height", pa.int32()), pa.field("aesthetic", pa.float64())])


def row(key: str, **changes) -> dict:
    fields = {"key": key, "kind": "image", "source": f"{key}.jpg", "path": f"{key}.jpg", "offset": 0, "size": 9}
    fields |= {"captions": [], "height": 8, "aesthetic": None, "verdict": "kept", "reason": "", "detail": ""}
    return fields | changes


def test_rows_come_back(tmp_path):
    table = PartTable(tmp_path, SCHEMA, {"inputs": "a"})
    rows = [row("a", captions=["鹿", "deer"]), row("b", height=None, aesthetic=5.25, verdict="dropped")]
    table.write(1, rows)
    assert (table.is_done(0), table.is_done(1)) == (False, True)
    assert table.read(1).to_pylist() == rows
    assert table.read(1, ["key"]).to_pydict() == {"key": ["a", "b"]}
    with pytest.raises(InputError, match=r"1 of 2 parts are missing \(0\)"):
        table.check_complete(2)


def test_a_torn_part_is_not_done(tmp_path):
    table = PartTable(tmp_path, SCHEMA, {"inputs": "a"})
    table.write(0, [row("a")])
    path = tmp_path / "parts" / "part-000000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert not table.is_done(0)


def test_another_making_is_refused_or_removed(tmp_path):
    PartTable(tmp_path, SCHEMA, {"inputs": "a", "min_side": 512}).write(0, [row("a")])
    assert PartTable(tmp_path, SCHEMA, {"inputs": "a", "min_side": 512}).is_done(0)
    with pytest.raises(InputError, match="made with min_side 512, this run has 256"):
        PartTable(tmp_path, SCHEMA, {"inputs": "a", "min_side": 256})
    with pytest.raises(InputError, match="made with min_side 512, this run has None"):
        PartTable(tmp_path, SCHEMA, {"inputs": "a"})
    assert not PartTable(tmp_path, SCHEMA, {"inputs": "a", "min_side": 256}, overwrite=True).is_done(0)


def test_what_is_not_known_to_be_ours_stays(tmp_path):
    """A table without what it was made by is somebody's, and one that cannot be read is not absent."""
    (tmp_path / "rows.parquet").write_bytes(b"another program's")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"holds rows.parquet, and not what it was made by: give another output"):
            PartTable(tmp_path, SCHEMA, {"inputs": "a"}, overwrite=overwrite)
    (tmp_path / "rows.parquet").unlink()
    PartTable(tmp_path, SCHEMA, {"inputs": "a"}).write(0, [row("a")])
    (tmp_path / "parts" / "made_by.json").write_text('{"format_version": 1')
    with pytest.raises(InputError, match="made_by.json cannot be read"):
        PartTable(tmp_path, SCHEMA, {"inputs": "a"}, overwrite=True)
    assert (tmp_path / "parts" / "part-000000.parquet").exists()


def test_jobs_that_start_together_leave_each_other_alone(tmp_path, monkeypatch):
    """One is done with its first part when the other, which began earlier, has just seen an empty folder."""
    read = PartTable._read_made_by

    def slow(table: PartTable):
        found = read(table)
        monkeypatch.setattr(PartTable, "_read_made_by", read)
        PartTable(tmp_path, SCHEMA, {"inputs": "a"}).write(0, [row("a")])
        return found

    monkeypatch.setattr(PartTable, "_read_made_by", slow)
    table = PartTable(tmp_path, SCHEMA, {"inputs": "a"})
    assert table.is_done(0)


def test_merged(tmp_path):
    table = PartTable(tmp_path, SCHEMA, {})
    table.write(0, [row("a")])
    table.write(1, [])
    table.write(2, [row("b")])
    path = table.write_merged(table.read(part) for part in range(3))
    assert pq.read_table(path)["key"].to_pylist() == ["a", "b"]
    assert [found.name for found in tmp_path.iterdir()] in (["rows.parquet", "parts"], ["parts", "rows.parquet"])


def test_a_full_disk_is_said_in_one_line(tmp_path):
    table = PartTable(tmp_path, SCHEMA, {})

    def tables():
        yield table.read(0)
        raise OSError(28, "No space left on device")

    table.write(0, [row("a")])
    with pytest.raises(InputError, match="output: cannot write .*rows.parquet .No space left on device"):
        table.write_merged(tables())
    assert [found.name for found in tmp_path.iterdir()] == ["parts"]

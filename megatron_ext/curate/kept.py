"""What was kept, for the next program: a list of where the pictures are, or the pictures themselves in tars.

FOLDER/kept.jsonl or FOLDER/kept.parquet   a row per picture: key, kind, source, path, offset, size, captions
FOLDER/kept/kept-000000.tar   WebDataset: KEY.jpg (the file as it was) and KEY.json with its captions and scores
"""

import functools
import hashlib
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_ext.config import InputError
from megatron_ext.curate.table import MADE_BY, SAMPLE_COLUMNS, Row, replace_file
from megatron_ext.curate.verdict import KEPT
from megatron_ext.files import writing
from megatron_ext.media import MediaError
from megatron_ext.media.members import add_member, media_suffix, stem_of
from megatron_ext.media.samples import Extent

LISTED = [column.name for column in SAMPLE_COLUMNS]
MEASURED = ("height", "width", "sha256", "aesthetic", "text", "colour")
"""What KEY.json says beside the captions."""


def kept_rows(rows: Path, columns: list[str]) -> Iterator[Row]:
    """The kept rows of a merged table, in its order."""
    with pq.ParquetFile(rows) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=[*columns, "verdict"])
            yield from table.filter(pc.equal(table["verdict"], KEPT)).drop_columns("verdict").to_pylist()


def write_jsonl(rows: Path, target: Path) -> None:
    """The list as JSON lines."""

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            for row in kept_rows(rows, LISTED):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    replace_file(target, write)


def write_parquet(rows: Path, target: Path) -> None:
    """The list as Parquet, with all columns of the table."""

    def write(path: Path) -> None:
        with pq.ParquetFile(rows) as file, pq.ParquetWriter(path, file.schema_arrow) as writer:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                writer.write_table(table.filter(pc.equal(table["verdict"], KEPT)))

    replace_file(target, write)


def plan_tars(folder: Path, per_tar: int) -> int:
    """Say in FOLDER/kept/made_by.json which tars there shall be, of the table that FOLDER holds; remove those of
    another table. Returns how many."""
    rows = folder / "rows.parquet"
    kept = folder / "kept"
    with writing(kept, "output"):
        kept.mkdir(exist_ok=True)
    verdicts = pq.read_table(rows, columns=["verdict"])["verdict"]
    pictures = pc.sum(pc.equal(verdicts, KEPT)).as_py() or 0
    plan = {"rows_sha256": _digest(rows), "per_tar": per_tar, "pictures": pictures, "tars": -(-pictures // per_tar)}
    content = json.dumps(plan, indent=1) + "\n"
    made_by = kept / MADE_BY
    if not made_by.exists() or made_by.read_text(encoding="utf-8") != content:
        for path in kept.iterdir():
            path.unlink()
        replace_file(made_by, lambda path: path.write_text(content, encoding="utf-8"))
    return plan["tars"]


def planned_tars(folder: Path) -> dict[str, int]:
    """What `plan_tars` wrote.

    Raises:
        InputError: it has not.
    """
    try:
        return json.loads((folder / "kept" / MADE_BY).read_text(encoding="utf-8"))
    except OSError:
        raise InputError(
            f"{folder / 'kept' / MADE_BY} is missing: run the stage decide with kept: tars first"
        ) from None


def write_tars(folder: Path, shard_index: int, num_shards: int, advance: Callable[[int], None]) -> None:
    """Write those of the planned tars that fall to this job and are not there; `advance` is told of each.

    Raises:
        InputError: the tars were planned of another table than the folder holds; a picture is not any more what was
            measured; a tar cannot be written.
    """
    plan = planned_tars(folder)
    table = folder / "rows.parquet"
    if _digest(table) != plan["rows_sha256"]:
        # Tars of both would hold some pictures twice and others not at all.
        raise InputError(
            f"{folder / 'kept' / MADE_BY} is the plan of another table than {table}: run the stage decide again with "
            "kept: tars"
        )
    rows = kept_rows(table, [*LISTED, *MEASURED])
    for number in range(plan["tars"]):
        chosen = list(itertools.islice(rows, plan["per_tar"]))
        path = folder / "kept" / f"kept-{number:06d}.tar"
        if number % num_shards == shard_index:
            if not path.exists():
                replace_file(path, functools.partial(_write_tar, chosen))
            advance(1)
    kept = folder / "kept"
    if len(list(kept.glob("kept-*.tar"))) == plan["tars"]:
        for leftover in kept.glob(".*.tmp"):  # of jobs that were killed
            leftover.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_tar(rows: Sequence[Row], path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for row in rows:
            fields = {"key": row["key"], "captions": row["captions"], **{name: row[name] for name in MEASURED}}
            stem = stem_of(row["key"])
            add_member(tar, f"{stem}.{media_suffix('image', row['source'], row['path'])}", _content(row))
            add_member(tar, f"{stem}.json", json.dumps(fields, ensure_ascii=False).encode())


def _content(row: Row) -> bytes:
    """The picture's file, which is still the one that was measured."""
    extent = Extent(path=Path(row["path"]), offset=row["offset"], size=row["size"], stamp=0)
    try:
        content = extent.read()
    except MediaError as error:
        raise InputError(f"{row['source']} was measured and {error}: restore it, or curate again") from None
    if hashlib.sha256(content).hexdigest() != row["sha256"]:
        raise InputError(f"{row['source']} has changed since it was measured: restore it, or curate again")
    return content

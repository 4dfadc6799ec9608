"""The table of a curation: one row per input, written part by part by any number of jobs, then merged.

FOLDER/parts/made_by.json          what shaped the scores; parts of another making are never mixed in
FOLDER/parts/part-000000.parquet   the rows of a part of the inputs, complete or absent
FOLDER/rows.parquet                all rows in the order of the parts, with the final verdicts
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_ext.config import InputError
from megatron_ext.files import replacing, writing

FORMAT_VERSION = 1
MADE_BY = "made_by.json"

SAMPLE_COLUMNS = (
    pa.field("key", pa.string(), nullable=False),
    pa.field("kind", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("path", pa.string(), nullable=False),
    pa.field("offset", pa.int64(), nullable=False),
    pa.field("size", pa.int64(), nullable=False),
    pa.field("captions", pa.list_(pa.string()), nullable=False),
)
"""What a sample is and where its bytes are: those of `megatron_ext.media.Sample`, and its captions."""

VERDICT_COLUMNS = (
    pa.field("verdict", pa.string(), nullable=False),
    pa.field("reason", pa.string(), nullable=False),
    pa.field("detail", pa.string(), nullable=False),
)
"""The fields of `Verdict`."""

Row = dict[str, Any]


def schema_of(scores: Iterable[pa.Field]) -> pa.Schema:
    """The columns of a table whose program measures `scores`."""
    return pa.schema([*SAMPLE_COLUMNS, *scores, *VERDICT_COLUMNS])


class PartTable:
    """The parts of one table. Jobs that share the folder write different parts; nothing else is shared."""

    def __init__(
        self, folder: str | Path, schema: pa.Schema, made_by: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        """`made_by` is what shaped the rows: inputs, options, weights; JSON values.

        Raises:
            InputError: the folder holds parts of another making; with `overwrite` they are removed. It cannot be
                written.
        """
        self.folder = Path(folder)
        self.schema = schema
        self._parts = self.folder / "parts"
        made_by = {"format_version": FORMAT_VERSION, **made_by}
        with writing(self.folder, "output"):
            self._parts.mkdir(parents=True, exist_ok=True)
        strange = next(self._rows(), None)  # looked for first: another job may just be beginning
        found = self._read_made_by()
        if found is None and strange is not None:
            raise InputError(f"{self.folder} holds {strange.name}, and not what it was made by: give another output")
        if found is not None:
            changed = next((key for key in (*made_by, *found) if found.get(key) != made_by.get(key)), None)
            if changed is None:
                return
            if not overwrite:
                raise InputError(
                    f"{self.folder} holds a table made with {changed} {found.get(changed)!r}, this run has "
                    f"{made_by.get(changed)!r}: give another output, or overwrite: true to make it anew"
                )
            for path in self._rows():  # the verdicts first: they must never stand beside parts of another making
                path.unlink(missing_ok=True)
        content = json.dumps(made_by, indent=1, ensure_ascii=False) + "\n"
        replace_file(self._parts / MADE_BY, lambda path: path.write_text(content, encoding="utf-8"))

    def is_done(self, part: int) -> bool:
        """Whether the rows of `part` are there, whole."""
        try:
            return pq.read_metadata(self._path(part)).num_columns == len(self.schema)
        except (OSError, pa.ArrowInvalid):
            return False

    def write(self, part: int, rows: Sequence[Row]) -> None:
        """The rows of `part`, all at once."""
        table = pa.Table.from_pylist(list(rows), schema=self.schema)
        replace_file(self._path(part), lambda path: pq.write_table(table, path))

    def read(self, part: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of `part`; all columns, or those named."""
        return pq.read_table(self._path(part), columns=columns, schema=None if columns else self.schema)

    def check_complete(self, count: int) -> None:
        """Raise InputError unless parts 0 to `count` - 1 are done."""
        missing = [part for part in range(count) if not self.is_done(part)]
        if missing:
            named = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise InputError(
                f"{self.folder}: {len(missing)} of {count} parts are missing ({named}): "
                "run the jobs that lack them first"
            )

    def write_merged(self, tables: Iterator[pa.Table]) -> Path:
        """All rows as FOLDER/rows.parquet, a row group per part; returns its path."""
        target = self.folder / "rows.parquet"

        def write(path: Path) -> None:
            with pq.ParquetWriter(path, self.schema) as writer:
                for table in tables:
                    writer.write_table(table)

        replace_file(target, write)
        for leftover in (*self.folder.glob(".*.tmp"), *self._parts.glob(".*.tmp")):  # of jobs that were killed
            leftover.unlink(missing_ok=True)
        return target

    def _path(self, part: int) -> Path:
        return self._parts / f"part-{part:06d}.parquet"

    def _rows(self) -> Iterator[Path]:
        """The files of this folder that hold rows, or what follows from them."""
        yield from self.folder.glob("rows.parquet")
        yield from self.folder.glob("kept.*")
        yield from self._parts.glob("part-*.parquet")

    def _read_made_by(self) -> dict[str, Any] | None:
        path = self._parts / MADE_BY
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path} cannot be read ({error}): remove {self.folder}, or give another output") from None


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file of another name, then make it `path`; jobs on several machines share the folder.

    Raises:
        InputError: it cannot be written.
    """
    with writing(path, "output"), replacing(path, is_shared=True) as temporary:
        write(temporary)

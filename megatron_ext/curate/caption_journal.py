"""Answers on disk: each is appended the moment it is there, so that a killed program loses what was in flight only.

STEM.answers.jsonl   a line of settings, then a line per answer or fault, in the order they came
STEM.jsonl           a line per finished sample, in the order of the inputs; written when the work is done
"""

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_ext.config import InputError
from megatron_ext.files import replacing, writing

FORMAT = 1
"""Number of the journal's layout."""


class CaptionJournal:
    """The answers of one shard. A context manager; one process at a time."""

    def __init__(self, folder: str | Path, stem: str, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        """`settings` are what shapes the answers; JSON values.

        Raises:
            InputError: the journal has other settings (with `overwrite` it is started anew), is no journal, cannot be
                written, or another process writes it.
        """
        self.path = Path(folder) / f"{stem}.answers.jsonl"
        self.result = Path(folder) / f"{stem}.jsonl"
        self._answers: dict[tuple[str, int], dict[str, Any]] = {}
        with writing(self.path, "output"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
            self._take_up({"format": FORMAT, **settings}, overwrite)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "CaptionJournal":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._file)

    def answer(self, key: str, number: int, media: list[int]) -> dict[str, Any] | None:
        """The answer about piece `number` of a sample whose media file has size and time `media`; None if there is none
        to keep: never asked, a fault, or asked about another file of that name."""
        found = self._answers.get((key, number))
        return found if found and found["media"] == media and "caption" in found else None

    def add(self, fields: dict[str, Any]) -> None:
        """Append one answer or fault: fields `key`, `piece`, `media` and `caption`, or `fault`."""
        self._answers[fields["key"], fields["piece"]] = fields
        self._append(fields)

    def finish(self, records: Iterable[dict[str, Any]]) -> bool:
        """Write the finished samples; False where the file holds just these already."""
        text = "".join(json.dumps(fields, ensure_ascii=False) + "\n" for fields in records).encode()
        with writing(self.result, "output"):
            if self.result.exists() and self.result.read_bytes() == text:
                return False
            with replacing(self.result) as temporary:
                temporary.write_bytes(text)
        return True

    def _append(self, fields: dict[str, Any]) -> None:
        line = (json.dumps(fields, ensure_ascii=False) + "\n").encode()
        with writing(self.path, "output"):
            # One write: a kill finds the whole line in the file or none of it. A full disk can tear it.
            if os.write(self._file, line) < len(line):
                raise OSError("the disk is full")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"output: another process writes {self.path}: let it end, or give another output or shard_index"
            ) from None

    def _take_up(self, settings: dict[str, Any], overwrite: bool) -> None:
        found, whole_bytes = self._read()
        if found is not None and found != settings:
            if not overwrite:
                changed = next(name for name in {**settings, **found} if found.get(name) != settings.get(name))
                raise InputError(
                    f"{self.path} holds answers made with {changed} {found.get(changed)!r}, this run has "
                    f"{settings.get(changed)!r}: give another output, or overwrite: true to remove them"
                )
            found, whole_bytes = None, 0
            self.result.unlink(missing_ok=True)
        with writing(self.path, "output"):
            os.ftruncate(self._file, whole_bytes)  # what a full disk tore
        if found is None:
            self._answers.clear()
            self._append(settings)

    def _read(self) -> tuple[dict[str, Any] | None, int]:
        """The settings and the number of bytes up to the end of the last whole line; fills the answers."""
        settings, whole_bytes = None, 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    fields = json.loads(line)
                    if number == 1:
                        settings = dict(fields)
                    else:
                        self._answers[fields["key"], fields["piece"]] = fields
                except (ValueError, TypeError, KeyError):
                    raise InputError(f"{self.path}:{number} is no line of a journal: remove the file") from None
                whole_bytes += len(line)
        return settings, whole_bytes

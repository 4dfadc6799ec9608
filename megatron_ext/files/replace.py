"""Writing a file under another name first, and what the system says when it cannot be written."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ext.config import InputError


@contextmanager
def replacing(path: str | Path, *, is_shared: bool = False) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when the block ends: a reader finds all of the old file
    or all of the new. When an exception ends the block nothing is left of the new one.

    What a killed process leaves has a name that begins with a dot and ends with `.tmp`; the next one overwrites it.
    With `is_shared`, for a file that several processes may write at the same time, each writes to a name of its own,
    and who owns the folder removes what is left.

    Raises:
        OSError: the file cannot be written or renamed.
    """
    path = Path(path)
    mark = f".{uuid.uuid4().hex[:8]}" if is_shared else ""
    temporary = path.with_name(f".{path.name}{mark}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # else a renamed file may be empty after a power cut
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: object, field: str) -> Iterator[None]:
    """While open, what the system says about a full disk or an impossible path becomes an InputError that names the
    option `field` and `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{field}: cannot write {path} ({error.strerror or error}): make room, check its permissions, or give "
            "another path"
        ) from error

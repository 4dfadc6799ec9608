"""Whether a result could be written, asked before the hours that it takes to make it."""

import tempfile
from pathlib import Path

from megatron_ext.config import InputError
from megatron_ext.files.replace import writing


def check_folder(path: str | Path, field: str) -> None:
    """Raise InputError unless a folder `path` is there or can be made, and be written to. Leaves nothing there."""
    there = Path(path)
    with writing(path, field):
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            raise InputError(f"{field}: cannot write {path} ({there} is a file): give another path")
        with tempfile.NamedTemporaryFile(dir=there):
            pass


def check_file(path: str | Path, field: str) -> None:
    """Raise InputError unless a file `path` can be written, its folders made where they are missing."""
    with writing(path, field):
        is_folder = Path(path).is_dir()
    if is_folder:
        raise InputError(f"{field}: cannot write {path} (it is a folder): give the path of a file")
    check_folder(Path(path).parent, field)

"""Reading what users and their programs wrote."""

import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_ext.config import InputError, reason_of

DEEPEST_JSON = 200
"""Arrays and objects within each other. Python parses some 1,000, and then fails to write or to send what it parsed."""


def text_of(content: bytes) -> str:
    """The text of a file in UTF-8, without the byte order mark that some editors begin a file with.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return content.decode("utf-8-sig")


def parse_json(content: str | bytes) -> Any:
    """What a JSON text holds; bytes are UTF-8.

    Raises:
        ValueError: it is no JSON, not UTF-8, or nested deeper than DEEPEST_JSON.
    """
    text = text_of(content) if isinstance(content, bytes) else content.removeprefix("\ufeff")
    try:
        value = json.loads(text)
    except RecursionError:
        is_deep = True
    else:
        is_deep = text.count("[") + text.count("{") > DEEPEST_JSON and _depth(value) > DEEPEST_JSON
    if is_deep:
        raise ValueError(f"it is nested deeper than {DEEPEST_JSON}")
    return value


@contextmanager
def reading(path: object, what: str) -> Iterator[None]:
    """While open, what is wrong with a file or its content becomes an InputError that says `what` and `path` it is."""
    try:
        yield
    except InputError:
        raise
    except _faults_of_content() as error:
        raise InputError(f"cannot read {what} {path}: {reason_of(error)}") from None


def _faults_of_content() -> tuple[type[Exception], ...]:
    """What gzip and pyarrow raise about damage. Asked for after the fact: who raised it has been imported by then."""
    arrow = sys.modules.get("pyarrow")
    return (OSError, EOFError, zlib.error, ValueError, *([arrow.ArrowException] if arrow else []))


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return depth

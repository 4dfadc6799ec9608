"""A disk that is full, without one: the system refuses to write more bytes into any file."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def no_file_beyond(most_bytes: int) -> Iterator[None]:
    """No file of this process may grow past `most_bytes`: "File too large", an OSError as that of a full disk is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

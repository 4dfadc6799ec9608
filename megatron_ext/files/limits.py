"""How many files a process may have open: as many as the system lets it, and one line where that is not enough."""

import functools
import os
import resource

from megatron_ext.config import InputError


def check_open_files(count: int, path: object) -> None:
    """Raise InputError, which names `path` and `ulimit -n`, unless `count` more files can be open at once."""
    limit = _raised_limit()
    held: list[int] = []
    try:
        for _ in range(count):
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}, and this process may have {limit:,}: raise the hard limit (ulimit -Hn, then "
            "ulimit -n) or join small datasets (tools/merge_datasets.py)"
        ) from None
    finally:
        for descriptor in held:
            os.close(descriptor)


@functools.cache
def _raised_limit() -> int:
    """The limit, after the soft one, 1,024 on most systems, was raised to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # macOS has an infinite hard limit that it does not let one take
        pass
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

"""Python's garbage collector on a schedule: the same steps on every rank.

Left alone it runs on each rank when that rank's allocation counters say so. With many ranks one of them is collecting
in most steps, and every collective waits for it.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def collected_every(interval: int) -> Iterator[Callable[[int], None]]:
    """While open, garbage is collected only where the yielded function is called with a step divisible by `interval`.

    With interval 0 Python collects as it likes, and the function does nothing.
    """
    if not interval:
        yield lambda step: None
        return
    was_enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    try:
        yield lambda step: gc.collect() if step % interval == 0 else None
    finally:
        if was_enabled:
            gc.enable()

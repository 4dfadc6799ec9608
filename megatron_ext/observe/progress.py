"""Progress of a long pass over items whose number is known or estimated: a bar on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_ext.observe.writers import duration

SECONDS_BETWEEN_LINES = 5.0


class Advance(Protocol):
    """What is told of the items just done."""

    def __call__(self, count: int, total: int | None = None, /) -> None:
        """`count` items are done; `total` is a better estimate of how many there are."""


@contextlib.contextmanager
def progress(label: str, total: int, unit: str, console: Console) -> Iterator[Advance]:
    """A function to call with the number of items just done; shows count, rate and time left.

    `unit` is what an item is called, in the plural.
    """
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(label, total=total, rate="")

            def advance(count: int, better: int | None = None) -> None:
                bar.update(task, advance=count, total=better)
                bar.update(task, rate=f"{_rate(bar.tasks[0].speed or 0)} {unit}/s")

            yield advance
        return

    start = last = time.monotonic()
    done = 0

    def report(count: int, better: int | None = None) -> None:
        nonlocal done, last, total
        done += count
        total = total if better is None else better
        now = time.monotonic()
        if done == total or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            rate = done / max(now - start, 1e-9)
            left = duration((total - done) / rate) if rate else "unknown"  # nothing is done while inputs are looked at
            console.print(f"{label}: {done:,}/{total:,} {unit} | {_rate(rate)} {unit}/s | ETA {left}", soft_wrap=True)

    yield report


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.1f}"

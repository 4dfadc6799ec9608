"""Which rank makes the others wait: each one's own time for its data and for its computation."""

import statistics
from typing import Any

from megatron_ext.runtime import Topology

NOTABLE = 1.2
"""A slowest rank this many times above the median is worth a line."""


def rank_times(data_seconds: float, compute_seconds: float, topology: Topology) -> dict[str, Any] | None:
    """Every rank's times, the slowest ranks and how far they are above the median; None on other ranks than the main.

    `compute_seconds` ends where the data ranks begin to wait for each other. Ranks of one tensor or context group
    wait for each other in every layer: a slow one shows as a slow group.
    """
    gathered = topology.gather((data_seconds, compute_seconds))
    if gathered is None:
        return None
    told: dict[str, Any] = {}
    for name, times in zip(("data", "compute"), zip(*gathered, strict=True), strict=True):
        slowest = max(range(len(times)), key=times.__getitem__)
        told[f"{name}_seconds"] = [round(seconds, 6) for seconds in times]
        told[f"slowest_{name}_rank"] = slowest
        told[f"slowest_{name}_over_median"] = times[slowest] / max(statistics.median(times), 1e-9)
    return told


def line_about(told: dict[str, Any]) -> str | None:
    """One line that names a notably slow rank; None where there is none."""
    parts = []
    for name in ("data", "compute"):
        ratio, rank = told[f"slowest_{name}_over_median"], told[f"slowest_{name}_rank"]
        seconds = told[f"{name}_seconds"][rank]
        # What takes a hundredth of a step makes nobody wait, however uneven it is.
        if ratio > NOTABLE and seconds > 0.01 * max(told["compute_seconds"]):
            parts.append(f"rank {rank} takes {seconds:.3f} s for its {name}, {ratio:.1f} times the median")
    return "; ".join(parts) or None

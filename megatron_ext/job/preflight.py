"""What the ranks of a job found on their nodes, compared: which nodes are not like the others, or too slow."""

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one rank found."""

    rank: int
    host: str
    facts: Mapping[str, str]
    """What must be the same on all ranks: name -> value. One rank may tell some of it for its node."""

    free_share: float | None = None
    """Of a GPU's memory, before the run takes its own."""

    tflops: float
    """Of a large matrix product, in TFLOP/s."""

    clock_s: float
    """Time of day when all ranks passed a barrier, in seconds."""

    write_mbs: float | None = None
    """Megabytes per second into the run folder, down to the disk; None where another rank of the node tells."""

    read_mbs: float | None = None
    """Megabytes per second back."""

    bandwidths: Mapping[str, float]
    """Axis -> GB/s of an all-reduce, as the bus sees it; axes of size 1 are left out."""

    peers: Mapping[str, tuple[int, ...]]
    """Axis -> ranks of this rank's group."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What is still good."""

    slow_share: float
    min_free_share: float
    min_disk_mbs: float
    max_clock_skew_s: float


def judge(findings: Sequence[Finding], bounds: Bounds) -> list[str]:
    """What is wrong, a line for each fault, with the nodes and ranks that it was found on."""
    return [
        *_unlike(findings),
        *_below(findings, "matrix products", "TFLOP/s", bounds.slow_share, lambda found: found.tflops),
        *_memory(findings, bounds),
        *_disk(findings, bounds),
        *_clocks(findings, bounds),
        *_links(findings, bounds),
    ]


def name_ranks(findings: Sequence[Finding]) -> str:
    """`n1 (rank 2), n2 (ranks 4, 5)`."""
    by_host: dict[str, list[int]] = {}
    for found in findings:
        by_host.setdefault(found.host, []).append(found.rank)
    return ", ".join(
        f"{host} (rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))})" for host, ranks in by_host.items()
    )


def code_digest() -> str:
    """Digest of this package's own source files: equal on all nodes, or they run different code."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _unlike(findings: Sequence[Finding]) -> list[str]:
    """Ranks whose facts are not those of the most."""
    faults = []
    for name in dict.fromkeys(name for found in findings for name in found.facts):
        told = [found for found in findings if name in found.facts]
        [(usual, _)] = Counter(found.facts[name] for found in told).most_common(1)
        for value in dict.fromkeys(found.facts[name] for found in told):
            if value != usual:
                odd = [found for found in told if found.facts[name] == value]
                faults.append(f"{name_ranks(odd)}: {name} is {value}, elsewhere {usual}")
    return faults


def _below(
    findings: Sequence[Finding], what: str, unit: str, share: float, value: Callable[[Finding], float]
) -> list[str]:
    median = statistics.median(map(value, findings))
    slow = [found for found in findings if value(found) < share * median]
    return [f"{name_ranks([found])}: {what} at {value(found):.3g} {unit}, the median is {median:.3g}" for found in slow]


def _memory(findings: Sequence[Finding], bounds: Bounds) -> list[str]:
    return [
        f"{name_ranks([found])}: {found.free_share:.0%} of the memory is free, less than {bounds.min_free_share:.0%}: "
        "another process holds it"
        for found in findings
        if found.free_share is not None and found.free_share < bounds.min_free_share
    ]


def _disk(findings: Sequence[Finding], bounds: Bounds) -> list[str]:
    return [
        f"{name_ranks([found])}: {way} the run folder at {speed:.3g} MB/s, less than {bounds.min_disk_mbs:g}"
        for found in findings
        for way, speed in (("writes", found.write_mbs), ("reads", found.read_mbs))
        if speed is not None and speed < bounds.min_disk_mbs
    ]


def _clocks(findings: Sequence[Finding], bounds: Bounds) -> list[str]:
    median = statistics.median(found.clock_s for found in findings)
    return [
        f"{name_ranks([found])}: its clock is {found.clock_s - median:+.1f} s off"
        for found in findings
        if abs(found.clock_s - median) > bounds.max_clock_skew_s
    ]


def _links(findings: Sequence[Finding], bounds: Bounds) -> list[str]:
    """Groups of an axis that are slow beside the other groups; and the node that all of them have in common."""
    faults = []
    by_rank = {found.rank: found for found in findings}
    for axis in dict.fromkeys(axis for found in findings for axis in found.bandwidths):
        groups = {found.peers[axis]: found.bandwidths[axis] for found in findings if axis in found.bandwidths}
        median = statistics.median(groups.values())
        slow = [ranks for ranks, speed in groups.items() if speed < bounds.slow_share * median]
        hosts = [{by_rank[rank].host for rank in ranks} for ranks in slow]
        common = set.intersection(*hosts) if hosts else set()
        suspects = f"; {', '.join(sorted(common))} is in all slow groups" if len(slow) > 1 and common else ""
        for ranks in slow:
            where = f"{name_ranks([by_rank[rank] for rank in ranks])}: all-reduce along the {axis} axis"
            faults.append(f"{where} at {groups[ranks]:.3g} GB/s, the median is {median:.3g}{suspects}")
    return faults

"""Look at the nodes of a job before its run starts on them; under a minute.

torchrun --nproc-per-node N tools/preflight.py --config FILE [--section.field VALUE ...]

Every rank reports its device, memory, speed of a matrix product and its result, versions and code; a rank of every node
writes to the run folder and reads it back; the axes of the run's layout reduce together; clocks are compared. Ends with
2 and names the nodes and ranks that are missing, unlike the others, or too slow.
"""

import hashlib
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.config import InputError, load, run_program, to_yaml
from megatron_ext.config.run import RunConfig
from megatron_ext.config.section import Count, NonNegative, Share
from megatron_ext.config.validate import validate
from megatron_ext.files import writing
from megatron_ext.job.history import note
from megatron_ext.job.preflight import Bounds, Finding, code_digest, judge

if TYPE_CHECKING:
    from megatron_ext.runtime import Topology
    from megatron_ext.runtime.probe import Roll

MEBI = 2**20
STARTED, JOINED, MEASURED = range(3)
"""How far a rank has come."""

DEADLINE_S = 45.0
"""Seconds for a rank to start, and for a collective."""


@dataclass(frozen=True, kw_only=True)
class PreflightConfig(RunConfig):
    """Look at the nodes of a job: the run's configuration, as pretrain_emu3.py takes it."""

    nodes: str = ""
    """Names of all nodes, separated by blanks: one from which no rank is heard can then be named."""

    slow_share: Share = 0.5
    """A device or a group of ranks that is slower than this share of the median is at fault."""

    min_free_share: Share = 0.9
    """Share of a GPU's memory that must be free."""

    min_disk_mbs: NonNegative = 20.0
    """Megabytes per second that a node must write to the run folder, and read from it."""

    disk_mib: Count = 64
    """Mebibytes that every node writes and reads."""

    max_clock_skew_s: NonNegative = 1.0
    """Seconds that a node's clock may be off."""


def disk_speed(folder: Path, mebibytes: int, name: str) -> tuple[float, float]:
    """(written, read) megabytes per second of one file in `folder`, on the disk and from it."""
    path = folder / f".preflight-{name}"
    block = os.urandom(MEBI)
    with writing(folder, "observe.run_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            started = time.perf_counter()
            with path.open("wb") as file:
                for _ in range(mebibytes):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
                written = time.perf_counter()
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else memory would answer
            reading = time.perf_counter()
            with path.open("rb", buffering=0) as file:
                while file.read(MEBI):
                    pass
            read = time.perf_counter()
        finally:
            path.unlink(missing_ok=True)
    size = mebibytes * MEBI / 1e6
    return size / (written - started), size / (read - reading)


@dataclass(frozen=True, kw_only=True)
class Own:
    """What a rank measures of its node and device, alone."""

    free_share: float
    tflops: float
    digest: str
    """Of the product of two matrices."""
    write_mbs: float | None
    read_mbs: float | None


def measure_own(config: PreflightConfig, topology: "Topology") -> Own:
    """Without any other rank."""
    from megatron_ext.runtime import probe

    free = probe.free_memory_share(topology.device)
    tflops, digest = probe.matrix_product(topology.device)
    write, read = None, None
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        write, read = disk_speed(Path(config.observe.run_dir), config.disk_mib, f"{topology.rank}")
    return Own(free_share=free, tflops=tflops, digest=digest, write_mbs=write, read_mbs=read)


def measure_together(config: PreflightConfig, topology: "Topology", own: Own) -> Finding:
    """What is between the ranks, beside what each has measured."""
    from megatron_ext.runtime import probe

    bandwidths, peers = probe.bandwidths(topology)
    facts = {
        **probe.software(topology.device),
        "code": code_digest(),
        "configuration": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12],
        "product of two matrices": own.digest,
    }
    return Finding(
        rank=topology.rank,
        host=probe.host_name(),
        facts=facts,
        free_share=own.free_share,
        tflops=own.tflops,
        clock_s=probe.clock_at_barrier(topology),
        write_mbs=own.write_mbs,
        read_mbs=own.read_mbs,
        bandwidths=bandwidths,
        peers=peers,
    )


def report(findings: list[Finding]) -> str:
    """The extremes of all ranks, a line for each measurement."""
    hosts = dict.fromkeys(found.host for found in findings)
    columns = {"TFLOP/s": [found.tflops for found in findings]}
    columns["disk write MB/s"] = [found.write_mbs for found in findings if found.write_mbs is not None]
    columns["disk read MB/s"] = [found.read_mbs for found in findings if found.read_mbs is not None]
    for axis in findings[0].bandwidths:
        columns[f"{axis} axis GB/s"] = [found.bandwidths[axis] for found in findings]
    lines = [f"preflight: {len(findings)} ranks on {len(hosts)} node{'s' if len(hosts) > 1 else ''}"]
    lines += [f"  {name:<18}{min(values):>9.4g} to {max(values):.4g}" for name, values in columns.items()]
    clocks = [found.clock_s for found in findings]
    return "\n".join((*lines, f"  {'clocks within':<18}{max(clocks) - min(clocks):>9.3g} s"))


def conclude(config: PreflightConfig, findings: list[Finding]) -> None:
    """Print what was found; raise InputError with all faults."""
    print(report(findings), flush=True)
    bounds = Bounds(
        slow_share=config.slow_share,
        min_free_share=config.min_free_share,
        min_disk_mbs=config.min_disk_mbs,
        max_clock_skew_s=config.max_clock_skew_s,
    )
    if faults := judge(findings, bounds):
        message = "preflight: " + "; ".join(faults)
        note(Path(config.observe.run_dir), "failure", error=message)
        raise InputError(message)


def absence(roll: "Roll", stage: int, patience_s: float, nodes: str) -> InputError | None:
    """The ranks that have not come to `stage`, as a fault that names their nodes; None where all have, or none: then
    one waits for the other, and nobody knows for whom."""
    missing = roll.missing(stage, patience_s)
    if not missing or len(missing) == roll.size:
        return None
    named = [f"rank {rank} ({node or 'node unknown'})" for rank, node in missing.items()]
    silent = [] if None not in missing.values() else sorted(set(nodes.split()) - roll.nodes())
    heard = f"; nothing was heard from {', '.join(silent)}" if silent else ""
    return InputError(
        f"preflight: {', '.join(named[:8])}{', ...' if len(named) > 8 else ''} did not come to "
        f"{('its start', 'the other ranks', 'the end of its own measurements')[stage]}{heard}: leave these nodes out "
        "(sbatch --exclude) and have them looked at"
    )


def main(argv: list[str]) -> None:
    """Look at the nodes of the run that `argv` describes."""
    config = load(PreflightConfig, argv, prog="preflight.py")
    validate(config, int(os.environ.get("WORLD_SIZE", 1)))
    from megatron_ext.runtime import Topology
    from megatron_ext.runtime.probe import Roll

    roll = Roll()
    roll.reach(STARTED)
    if fault := absence(roll, STARTED, DEADLINE_S, config.nodes):
        raise fault
    runtime = replace(config.runtime, distributed_timeout_s=int(DEADLINE_S))
    stage = JOINED
    try:
        with Topology.start(runtime, config.parallel) as topology:
            roll.reach(JOINED)
            stage = MEASURED
            own = measure_own(config, topology)
            roll.reach(MEASURED)  # before any wait for the others, so that who is late is who is at fault
            findings = topology.gather(measure_together(config, topology, own))
            topology.from_main(lambda: conclude(config, findings))
    except RuntimeError as error:  # torch's, of a collective that lost a rank
        raise absence(roll, stage, 5.0, config.nodes) or error from error


def tells(error: Exception) -> bool:
    """Whether this rank is the one that reports what ends it."""
    from megatron_ext.runtime.faults import is_told_here

    return is_told_here(error)


def cli() -> None:
    """Console script emu3-preflight."""
    run_program(main, tells=tells)


if __name__ == "__main__":
    cli()

"""Captions from a model behind OpenAI's chat protocol: folders, tars or manifests of media in, JSON lines out.

Every answer is on disk the moment it is there. Started again, the program asks only about what has no answer yet.
"""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.console import Console

from megatron_ext.config import BadSamples, InputError, as_dict, load, run_program
from megatron_ext.config.section import Count, Name, Share
from megatron_ext.curate.caption_journal import CaptionJournal
from megatron_ext.curate.caption_server import CaptionServer, ServerConfig
from megatron_ext.curate.captioning import Captioning, finished_record
from megatron_ext.curate.captions import ShownConfig
from megatron_ext.curate.inputs import pieces_of
from megatron_ext.files import check_folder
from megatron_ext.media import Fault, Sample
from megatron_ext.media.array import ShardConfig, shard_of_job
from megatron_ext.observe.progress import progress


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(ShardConfig):
    """Caption pictures and clips: folders, WebDataset tars or manifests in, JSON lines out."""

    inputs: list[Name]
    """Folders of media files, WebDataset tars, manifests, single files, and patterns of these."""

    output: Name
    """Folder for captions-IIIII-of-NNNNN.jsonl and, beside it, the answers as they come (.answers.jsonl)."""

    server: ServerConfig
    """Where and how to ask."""

    shown: ShownConfig = field(default_factory=ShownConfig)
    """What the model is shown."""

    decoders: Count = 4
    """Threads that read, decode and shrink media."""

    max_bad_fraction: Share = 0.01
    """Largest share of the samples that may end without a usable answer; more of them stop."""

    overwrite: bool = False
    """Remove the answers that output holds when they were made with other options; false refuses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inputs:
            raise InputError("inputs is empty: give folders or tars of media")


def settings(config: CaptionConfig) -> dict:
    """What shapes the answers: with other values the journal's answers cannot stay."""
    server = {name: getattr(config.server, name) for name in ("model", "max_tokens", "temperature")}
    return {**server, **as_dict(config.shown)}


def main(argv: list[str]) -> None:
    """Run the program with the arguments after its name."""
    config = load(CaptionConfig, argv, prog="caption")
    check_folder(config.output, "output")
    console = Console(highlight=False)
    bad = BadSamples(config.max_bad_fraction)
    shard, shards = shard_of_job(config.shard_index, config.num_shards)
    pieces, _ = pieces_of(config.inputs, 1)
    # Runs of neighbours: the shards' files one after the other are the file of one shard.
    own = pieces[shard * len(pieces) // shards : (shard + 1) * len(pieces) // shards]
    samples = usable_samples((entry for piece in own for entry in piece.entries()), bad)
    total = len(samples) + len(bad.samples)
    bad.check(total)
    stem = f"captions-{shard:05d}-of-{shards:05d}"
    with CaptionJournal(config.output, stem, settings(config), overwrite=config.overwrite) as journal:
        missing = [sample for sample in samples if finished_record(sample, journal) is None]
        if missing:
            if len(missing) < len(samples):
                done = len(samples) - len(missing)
                console.print(f"{journal.path}: {done} of {len(samples)} samples were done before", soft_wrap=True)
            start = time.monotonic()
            with progress("caption", len(missing), "samples", console) as advance:
                work = Captioning(missing, config.shown, journal, bad, advance=advance)
                server = work.run(config.server, decoders=config.decoders, total=total)
            _tell_work(server, len(missing), time.monotonic() - start, console)
        records = [record for sample in samples if (record := finished_record(sample, journal))]
        written = journal.finish(records)
    state = "" if written else ": finished before, nothing has changed"
    console.print(f"{journal.result}: {len(records)} of {total} samples have captions{state}", soft_wrap=True)
    _tell_faults(bad, console)


def usable_samples(entries: Iterable[Sample | Fault], bad: BadSamples) -> list[Sample]:
    """The samples; what listing found unusable, and a sample of an earlier one's key, go to `bad`."""
    found: dict[str, Sample] = {}
    for entry in entries:
        if isinstance(entry, Fault):
            bad.add(entry.source, entry.reason)
        elif entry.key in found:
            bad.add(entry.source, f"its key {entry.key} is that of {found[entry.key].source}")
        else:
            found[entry.key] = entry
    return list(found.values())


def _tell_work(server: CaptionServer, count: int, seconds: float, console: Console) -> None:
    console.print(
        f"asked about {count} samples in {seconds:.1f} s; the server counted {server.tokens['prompt']:,} tokens of "
        f"questions and {server.tokens['completion']:,} of answers",
        soft_wrap=True,
    )
    for fault, times in server.retries.most_common():
        console.print(f"asked again {times} times: {fault}", markup=False, soft_wrap=True)


def _tell_faults(bad: BadSamples, console: Console) -> None:
    for line in bad.lines():
        console.print(line, markup=False, soft_wrap=True)
    for reason, count in Counter(reason for _, reason in bad.samples).most_common():
        console.print(f"without captions, {count} samples: {reason}", markup=False, soft_wrap=True)
    if bad.samples:
        console.print("the next start asks about these again")


def cli() -> None:
    """Entry of the console script."""
    run_program(main)


if __name__ == "__main__":
    run_program(main)

"""Pictures and clips to visual codes: folders, WebDataset tars or manifests in, tar shards of codes and a manifest out.

What cannot be used is skipped, counted and named; too much of it stops the program. Several jobs share the work by
shard_index and num_shards; what they write does not depend on how many they are. Started again, a job does only what is
not finished; when inputs, tokenizer or options are not as they were, it refuses or, if told so, overwrites.
"""

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console

from megatron_ext.config import BadSamples, InputError, as_dict, load, run_program
from megatron_ext.config.runtime import DeviceName, RuntimeConfig
from megatron_ext.config.section import Count, Name, NonNegative, Number, Share
from megatron_ext.files import check_folder
from megatron_ext.media import Fault, MediaError, Part, ResizeConfig, Sample, listing_of, parts_of, readable_name
from megatron_ext.media.array import ShardConfig, shard_of_job
from megatron_ext.media.decode import ClipConfig, DecodedSample, Decoder
from megatron_ext.media.workers import WorkerPool
from megatron_ext.observe.progress import progress
from megatron_ext.runtime.device import choose_device
from megatron_ext.vision import MoVQGAN, load_vision_tokenizer
from megatron_ext.vision.shards import SKIPPED, Chunk, CodesFolder, Skipped
from megatron_ext.vision.tokenize import tokenize


@dataclass(frozen=True, kw_only=True)
class TokenizeVisionConfig(ShardConfig):
    """Tokenize pictures and clips: folders, WebDataset tars or manifests in, tar shards of codes and a manifest out."""

    inputs: list[Name]
    """Folders in the layout of img2dataset's "files" output or of tars, WebDataset tars, pictures, clips, manifests
    (.jsonl or .parquet with a column path, as curation writes them; img2dataset's .parquet with pictures), and glob
    patterns of these."""

    tokenizer: Name
    """Folder of the vision tokenizer (config.json, model.safetensors)."""

    output: Name
    """Folder for the shards and manifest.json; jobs of one work share it."""

    resize: ResizeConfig = field(default_factory=ResizeConfig)
    """Size at which pictures and frames are encoded."""

    clips: ClipConfig = field(default_factory=ClipConfig)
    """Which frames of clips are encoded."""

    batch_size: Count = 8
    """Pictures, or clips, of equal size encoded at once."""

    shard_size: Count = 1000
    """Input samples of one shard of codes; an interruption loses at most this much work."""

    decode_workers: Number = 2
    """Processes that read, decode and resize while this one encodes; 0 decodes in this one."""

    worker_timeout_s: NonNegative = 600.0
    """Seconds after which a sample is skipped over which such a process hangs; 0 waits for ever."""

    merge_only: bool = False
    """Tokenize nothing: complete the folder that the jobs of a larger num_shards have filled."""

    max_bad_fraction: Share = 0.01
    """Largest share of the samples that may be unusable (undecodable, unreadable captions); more of them stop."""

    overwrite: bool = False
    """Make output anew where it was made with other inputs, options or tokenizer; false refuses."""

    device: DeviceName = "auto"
    """Where to compute; auto takes CUDA when a GPU is visible."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inputs:
            raise InputError("inputs is empty: give folders, tars or manifests of media")


@dataclass(frozen=True, kw_only=True)
class Work:
    """A chunk of the inputs that is not tokenized yet."""

    chunk: Chunk
    entries: list[Sample | Fault]
    passed: float
    """How far through all inputs its end is, in 0..1."""


def manifest_header(config: TokenizeVisionConfig, parts: list[Part], model: MoVQGAN) -> dict:
    """What shapes the codes and their order, beside the contents of the inputs."""
    names = [[part.layout, *map(str, part.paths)] for part in parts]
    return {
        "vision_tokenizer": model.identity,
        "codebook_size": model.config.codebook_size,
        "spatial_factor": model.config.spatial_factor,
        "temporal_factor": model.config.temporal_downsample_factor,
        "resize": as_dict(config.resize),
        "clips": as_dict(config.clips),
        "batch_size": config.batch_size,
        "shard_size": config.shard_size,
        "input_names_sha256": hashlib.sha256(json.dumps(names).encode()).hexdigest(),
    }


def chunks_of_job(parts: list[Part], shard_size: int, index: int, count: int) -> Iterator[Work]:
    """The chunks of job `index` of `count`: tars whole, in turn, so that a job lists only its own; folders and
    manifests, which every job lists, chunk by chunk. An input is listed when its turn comes."""
    for number, part in enumerate(parts):
        if part.layout == "tar" and number % count != index:
            continue
        listing = listing_of(part)
        chunks = max(1, math.ceil(len(listing) / shard_size))
        for place in range(chunks):
            if part.layout != "tar" and (number + place) % count != index:
                continue
            entries = listing.entries(place * shard_size, (place + 1) * shard_size)
            chunk = Chunk(part=number, number=place, count=chunks, inputs_sha256=_digest(entries))
            yield Work(chunk=chunk, entries=entries, passed=(number + (place + 1) / chunks) / len(parts))


def _digest(entries: list[Sample | Fault]) -> str:
    """Of what would be seen to change if the files did."""
    seen = []
    for entry in entries:
        if isinstance(entry, Fault):
            seen.append((entry.key, entry.source, entry.reason))
        else:
            extents = (part for part in (entry.media, entry.text, entry.fields) if part)
            seen.append((entry.key, entry.kind, entry.given, *((e.offset, e.size, e.stamp) for e in extents)))
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def main(argv: list[str]) -> None:
    """Run the program with the arguments after its name."""
    config = load(TokenizeVisionConfig, argv, prog="tokenize_vision")
    check_folder(config.output, "output")
    console = Console(highlight=False)
    bad = BadSamples(config.max_bad_fraction)
    index, count = shard_of_job(config.shard_index, config.num_shards)
    parts = parts_of(config.inputs)
    model = load_vision_tokenizer(config.tokenizer)
    factor = model.config.spatial_factor
    if config.resize.rule == "square" and config.resize.size % factor:
        raise InputError(f"resize.size = {config.resize.size}: must be a multiple of the spatial factor {factor}")
    folder = CodesFolder(config.output, manifest_header(config, parts, model), overwrite=config.overwrite)
    if not config.merge_only:
        job = _Job(config, model, folder, bad, console)
        job.run(chunks_of_job(parts, config.shard_size, index, count))
        if count > 1:
            then = "when all are, complete the folder with merge_only: true"
            console.print(f"{config.output}: job {index} of {count} is finished; {then}", soft_wrap=True)
            _print_skipped(bad, console)
            return
    _complete(config, folder, len(parts), console)


class _Job:
    """The tokenization of one job's chunks."""

    def __init__(
        self, config: TokenizeVisionConfig, model: MoVQGAN, folder: CodesFolder, bad: BadSamples, console: Console
    ) -> None:
        self._config = config
        self._model = model
        self._folder = folder
        self._bad = bad
        self._console = console
        self._listed = 0
        """Samples of the chunks whose turn has come."""
        self._reused = 0
        """Those of them that were finished."""
        self._passed = 0.0
        """How far through the inputs the last of these chunks is."""
        self._total: int | None = None
        """All samples of the job; None as long as there are more chunks to list."""

    def run(self, works: Iterator[Work]) -> None:
        """Tokenize what is not finished; a chunk is listed when its turn comes."""
        output = self._config.output
        todo = self._unfinished(works)
        first = next(todo, None)
        if first is None:
            self._console.print(f"{output} is finished and nothing has changed: reused", soft_wrap=True)
            return
        if self._reused:
            self._console.print(f"{output}: {self._reused:,} samples were done before, going on", soft_wrap=True)
        start = time.monotonic()
        self._model.to(choose_device(RuntimeConfig(device=self._config.device), 0))
        with progress("tokenize", self._expected(), "samples", self._console) as advance:
            self._tokenize(itertools.chain([first], todo), lambda count: advance(count, self._expected()))
        done = f"tokenized {self._total - self._reused} samples in {time.monotonic() - start:.1f} s"
        before = f"; {self._reused} of {self._total} samples were done before" if self._reused else ""
        self._console.print(done + before, soft_wrap=True)

    def _unfinished(self, works: Iterator[Work]) -> Iterator[Work]:
        """The chunks to be tokenized. What is known to be unusable is counted as it is listed."""
        for work in works:
            record = self._folder.finished(work.chunk)
            if record is None:
                work.entries[:] = _distinct(work.entries)
            else:
                self._reused += len(work.entries)
            self._listed += len(work.entries)
            self._passed = work.passed
            for item in record["skipped"] if record else _faults(work.entries):
                self._bad.add(item["source"], item["reason"])
            self._check_bad()
            if record is None:
                yield work
        self._total = self._listed
        self._check_bad()

    def _expected(self) -> int:
        """Samples that are to be tokenized, as far as the chunks listed so far tell."""
        return (self._total or round(self._listed / self._passed)) - self._reused

    def _check_bad(self) -> None:
        # Finished shards stay: with a larger fraction the work goes on.
        self._bad.check_early(self._listed, self._total)

    def _tokenize(self, todo: Iterator[Work], advance: Callable[[int], None]) -> None:
        decoder = Decoder(
            resize=self._config.resize,
            clips=self._config.clips,
            spatial_factor=self._model.config.spatial_factor,
            temporal_factor=self._model.config.temporal_downsample_factor,
        )
        with WorkerPool(decoder, self._config.decode_workers, timeout_s=self._config.worker_timeout_s) as pool:
            # One stream over all chunks: the workers go on while a shard is written.
            begun, todo = itertools.tee(todo)
            results = pool.map(entry for work in begun for entry in work.entries if isinstance(entry, Sample))
            # The next chunk is listed first, so that an input of which nothing can be used leaves nothing.
            for work, _ in itertools.pairwise(itertools.chain(todo, [None])):
                skipped: list[Skipped] = []
                usable = self._usable(work.entries, results, skipped, advance)
                samples = tokenize(usable, self._model, batch_size=self._config.batch_size, advance=advance)
                self._folder.write(work.chunk, samples, skipped)
                work.entries.clear()  # tee lets go of what both have had by the dozen

    def _usable(
        self,
        entries: list[Sample | Fault],
        results: Iterator[DecodedSample | MediaError],
        skipped: list[Skipped],
        advance: Callable[[int], None],
    ) -> Iterator[DecodedSample]:
        """The results of the samples among `entries`; what is wrong with the others is added to `skipped`."""
        for entry in entries:
            result = next(results) if isinstance(entry, Sample) else MediaError(entry.reason)
            if isinstance(result, DecodedSample):
                yield result
                continue
            source = readable_name(entry.source)
            skipped.append({"key": entry.key, "source": source, "reason": str(result)})
            if isinstance(entry, Sample):  # faults were counted as they were listed
                self._bad.add(source, str(result))
                self._check_bad()
            advance(1)


def _distinct(entries: list[Sample | Fault]) -> Iterator[Sample | Fault]:
    """The entries; a sample whose key an earlier one has is a fault."""
    first: dict[str, str] = {}
    for entry in entries:
        source = readable_name(entry.source)
        if isinstance(entry, Sample) and entry.key in first:
            yield Fault(key=entry.key, source=source, reason=f"its key is also that of {first[entry.key]}")
            continue
        if isinstance(entry, Sample):
            first[entry.key] = source
        yield entry


def _faults(entries: list[Sample | Fault]) -> list[Skipped]:
    """What is known to be unusable before anything is decoded."""
    faults = (entry for entry in entries if isinstance(entry, Fault))
    return [{"key": fault.key, "source": fault.source, "reason": fault.reason} for fault in faults]


def _complete(config: TokenizeVisionConfig, folder: CodesFolder, parts: int, console: Console) -> None:
    """Write the manifest of a folder whose chunks are all finished, and tell what it holds."""
    bad = BadSamples(config.max_bad_fraction)
    records = folder.records(parts)
    for item in (item for record in records.values() for item in record["skipped"]):
        bad.add(item["source"], item["reason"])
    bad.check(sum(len(record["hashes"]) + len(record["skipped"]) for record in records.values()))
    manifest = folder.complete(records)
    console.print(
        f"{config.output}: {manifest['samples']['image']} pictures, {manifest['samples']['video']} clips "
        f"({manifest['without_captions']} without a caption) in {len(manifest['shards'])} shards, "
        f"vision tokenizer {manifest['vision_tokenizer']}",
        soft_wrap=True,
    )
    _print_skipped(bad, console)
    if bad.samples:
        console.print(f"{len(bad.samples)} were skipped: {config.output}/{SKIPPED}", soft_wrap=True)
    if not manifest["shards"]:
        raise InputError(f"none of the {len(bad.samples)} samples of {config.inputs} could be used")


def _print_skipped(bad: BadSamples, console: Console) -> None:
    for line in bad.lines():
        console.print(line, markup=False, soft_wrap=True)


def cli() -> None:
    """Entry of the console script."""
    run_program(main)


if __name__ == "__main__":
    run_program(main)

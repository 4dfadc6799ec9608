"""How long it takes to turn media and texts into datasets, on how many tasks, and how much room it needs.

Everything follows from counts and from measured rates; no rate is assumed. One core or one GPU is the unit of rates:
tasks share nothing, so more of them take proportionally less time.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_ext.config import InputError
from megatron_ext.config.section import Count, Name, NonNegative, Number, Positive, Section, Share, above, least
from megatron_ext.files import parse_json
from megatron_ext.vocab import Grid, VocabLayout
from megatron_ext.vocab.document import BlockFormat

TAR_BLOCK = 512
"""A tar's members and their headers fill whole blocks of so many bytes."""

NPY_HEADER = 128
"""Bytes before the numbers of a .npy file."""

FACTS = 120
"""Bytes of a sample's JSON without its captions and key, its source's name not counted: names of fields, hash."""

INDEX = 20
"""Bytes of .idx per document: length, offset, first sequence."""

BYTES_PER_ID = 4
"""Ids are int32; a text id stands for about so many bytes of text, too (Qwen's ranks: 3.4 to 4.6)."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Section):
    """Plan the preprocessing of a large corpus from measured figures."""

    pictures: Number = 1_000_000_000
    """Pictures that are tokenized."""

    kept_share: Annotated[Share, above(0)] = 0.3
    """Share of the raw pictures that curation keeps."""

    raw_kilobytes: Positive = 150.0
    """Mean kilobytes of a raw picture."""

    height: Count = 64
    """Rows of codes of a picture; 64 x 64 is 512 x 512 pixels."""

    width: Count = 64
    """Columns of codes of a picture."""

    clips: Number = 0
    """Clips that are tokenized."""

    clip_frames: Count = 30
    """Frames of codes of a clip, as large as pictures; 30 are 5 seconds at 24 frames per second."""

    documents_per_sample: Positive = 1.0
    """Documents of a picture or clip: its captions that are used, doubled by caption_position both."""

    caption_ids: NonNegative = 60.0
    """Mean ids of a caption."""

    key_bytes: Number = 32
    """Mean length of a source key; a sample's file name is taken to be as long."""

    text_gigabytes: NonNegative = 0.0
    """Text, in gigabytes of UTF-8."""

    text_bytes: Positive = 4000.0
    """Mean bytes of a text."""

    shard_size: Count = 10_000
    """Samples of a tar, as tokenize_vision.py is told."""

    rates: tuple[Name, ...] = ()
    """List of JSON files with measured rates, under the names of the eight fields below (benchmarks/preprocess.py and
    near_duplicates.py write them); a later file wins."""

    filter_pictures_per_second: NonNegative | None = None
    """Pictures that curation judges per core; 0: no curation."""

    cluster_hashes_per_second: NonNegative | None = None
    """Perceptual hashes of raw pictures that preprocess_data.py clusters, on one core; 0: no tables of duplicates."""

    divide_samples_per_second: NonNegative | None = None
    """Pictures and clips that preprocess_data.py reads per core to divide them; 0: nothing is held out."""

    tokenize_pictures_per_second: NonNegative | None = None
    """Pictures that tokenize_vision.py encodes per GPU."""

    tokenize_clips_per_second: NonNegative | None = None
    """Clips that tokenize_vision.py encodes per GPU."""

    ids_per_second: NonNegative | None = None
    """Ids of captioned pictures that preprocess_data.py writes per core."""

    text_megabytes_per_second: NonNegative | None = None
    """Text that preprocess_data.py encodes per core."""

    merge_megabytes_per_second: NonNegative | None = None
    """Ids that merge_datasets.py copies."""

    task_hours: Positive = 4.0
    """Hours that a task of a job array shall take: below the queue's limit, and the most that a lost node costs."""

    cores_per_task: Count = 8
    """Cores of a task that curates or makes documents."""

    gpus_per_task: Count = 1
    """GPUs of a task that tokenizes."""

    tasks_at_once: Count = 128
    """Tasks that run at the same time."""

    max_array_size: Annotated[int, least(2)] = 1001
    """Slurm's MaxArraySize (scontrol show config): tasks of an array are fewer."""

    json: bool = False
    """Print the plan as JSON."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One program over the whole corpus."""

    name: str
    amount: float
    unit: str
    """What the amount counts."""
    device: str
    """What the device-hours are of."""
    device_hours: float
    array_size: int
    """Tasks; also the number of shards."""
    task_hours: float
    hours: float
    """From first to last task."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Stages in their order, gigabytes by what they hold, and counts."""

    stages: tuple[Stage, ...]
    gigabytes: Mapping[str, float]
    counts: Mapping[str, int]


def make_plan(config: PlanConfig) -> Plan:
    """Raises InputError: a rate is missing that the corpus needs."""
    rates = _read_rates(config)
    sample_ids = _document_ids(config, 1, clip=False), _document_ids(config, config.clip_frames, clip=True)
    media = (config.pictures, config.clips)
    media_documents = sum(media) * config.documents_per_sample
    media_ids = sum(n * ids for n, ids in zip(media, sample_ids, strict=True)) * config.documents_per_sample
    texts = config.text_gigabytes * 1e9 / config.text_bytes
    text_ids = config.text_gigabytes * 1e9 / BYTES_PER_ID + 2 * texts
    ids = media_ids + text_ids
    work = [
        ("curate pictures", config.pictures / config.kept_share, "pictures", "core", "filter_pictures_per_second", 1),
        ("tokenize pictures", config.pictures, "pictures", "GPU", "tokenize_pictures_per_second", 1),
        ("tokenize clips", config.clips, "clips", "GPU", "tokenize_clips_per_second", 1),
        ("documents of media", media_ids, "ids", "core", "ids_per_second", 1),
        ("documents of text", config.text_gigabytes * 1e9, "bytes", "core", "text_megabytes_per_second", 1e6),
    ]
    stages = []
    for name, amount, unit, device, rate, scale in work:
        if amount and _needed(rates, rate):
            stages.append(_array(config, name, amount, unit, device, amount / (rates[rate] * scale) / 3600))
    # What the first task of preprocess_data.py does once, for all of them, before documents are made.
    once = [
        ("cluster duplicates", config.pictures / config.kept_share, "hashes", "cluster_hashes_per_second", 1),
        ("divide media", sum(media), "samples", "divide_samples_per_second", config.cores_per_task),
    ]
    place = next((n for n, stage in enumerate(stages) if stage.name.startswith("documents")), len(stages))
    stages[place:place] = [
        _single(name, amount, unit, amount / rates[rate] / 3600, cores)
        for name, amount, unit, rate, cores in once
        if amount and _needed(rates, rate)
    ]
    if ids and _needed(rates, "merge_megabytes_per_second"):
        hours = ids * BYTES_PER_ID / (rates["merge_megabytes_per_second"] * 1e6) / 3600
        stages.append(_single("merge", ids * BYTES_PER_ID, "bytes", hours, 1))
    documents = media_documents + texts
    spans = (config.pictures + config.clips * config.clip_frames) * config.documents_per_sample
    datasets = ids * BYTES_PER_ID + documents * (INDEX + 1 + 8 + 8 + config.key_bytes) + spans * 8
    gigabytes = {
        "raw pictures": config.pictures / config.kept_share * config.raw_kilobytes / 1e6,
        "codes": sum(n * _tar_bytes(config, frames) for n, frames in zip(media, (1, config.clip_frames), strict=True))
        / 1e9,
        "datasets": datasets / 1e9,
        "datasets while they are merged": 2 * datasets / 1e9,
    }
    counts = {"tars": math.ceil(sum(media) / config.shard_size), "documents": round(documents), "ids": round(ids)}
    return Plan(stages=tuple(stages), gigabytes=gigabytes, counts=counts)


def _array(config: PlanConfig, name: str, amount: float, unit: str, device: str, device_hours: float) -> Stage:
    devices = config.gpus_per_task if device == "GPU" else config.cores_per_task
    size = min(max(1, math.ceil(device_hours / devices / config.task_hours)), config.max_array_size - 1)
    task_hours = device_hours / devices / size
    return Stage(
        name=name, amount=amount, unit=unit, device=device, device_hours=device_hours, array_size=size,
        task_hours=task_hours, hours=math.ceil(size / config.tasks_at_once) * task_hours,
    )  # fmt: skip


def _single(name: str, amount: float, unit: str, core_hours: float, cores: int) -> Stage:
    """A stage of one task, which uses so many cores."""
    hours = core_hours / cores
    return Stage(
        name=name, amount=amount, unit=unit, device="core", device_hours=core_hours, array_size=1, task_hours=hours,
        hours=hours,
    )  # fmt: skip


def _document_ids(config: PlanConfig, frames: int, *, clip: bool) -> float:
    """BOS, caption, SOV, meta, SOT, frames, EOV, EOS."""
    grid = Grid(frames, config.height, config.width, *((24_000, 5_000) if clip else ()))
    return 1 + config.caption_ids + 2 + len(grid.meta) + grid.body_length(BlockFormat(frame_ends=True)) + 1


def _tar_bytes(config: PlanConfig, frames: int) -> int:
    """Of a sample's two members, headers included."""
    size = 2 if VocabLayout.emu3().codebook_size <= 1 << 16 else 4
    contents = (
        NPY_HEADER + frames * config.height * config.width * size,
        FACTS + 2 * config.key_bytes + round(config.caption_ids * BYTES_PER_ID),
    )
    return sum(TAR_BLOCK + math.ceil(content / TAR_BLOCK) * TAR_BLOCK for content in contents)


def _needed(rates: Mapping[str, float | None], name: str) -> bool:
    """Whether there is work at this rate: 0 says no; raises InputError where nobody has measured it."""
    if rates[name] is None:
        raise InputError(f"{name} is not given: measure it, and give it or a file in rates that has it")
    return rates[name] > 0


def _read_rates(config: PlanConfig) -> dict[str, float | None]:
    given = {
        "filter_pictures_per_second": config.filter_pictures_per_second,
        "cluster_hashes_per_second": config.cluster_hashes_per_second,
        "divide_samples_per_second": config.divide_samples_per_second,
        "tokenize_pictures_per_second": config.tokenize_pictures_per_second,
        "tokenize_clips_per_second": config.tokenize_clips_per_second,
        "ids_per_second": config.ids_per_second,
        "text_megabytes_per_second": config.text_megabytes_per_second,
        "merge_megabytes_per_second": config.merge_megabytes_per_second,
    }
    measured: dict[str, float] = {}
    for path in config.rates:
        try:
            content = parse_json(Path(path).read_bytes())
            measured |= {name: float(content[name]) for name in given if name in content}
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"rates: cannot read {path} ({error}): give JSON files with measured rates") from None
    rates = {name: measured.get(name) if value is None else value for name, value in given.items()}
    for name, value in rates.items():
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise InputError(f"{name} is {value}: give a number of at least 0")
    return rates


def plan_lines(plan: Plan, config: PlanConfig) -> list[str]:
    """The plan as a table."""
    lines = [f"{'stage':<20}{'amount':>20}{'device-hours':>18}{'tasks':>8}{'h each':>8}{'hours':>10}"]
    for stage in plan.stages:
        amount = f"{stage.amount:,.0f} {stage.unit}"
        spent = f"{stage.device_hours:,.0f} {stage.device}"
        lines.append(
            f"{stage.name:<20}{amount:>20}{spent:>18}{stage.array_size:>8,}{stage.task_hours:>8.1f}{stage.hours:>10,.1f}"
        )
    total = sum(stage.hours for stage in plan.stages)
    lines += [
        f"{'all':<20}{'':>54}{total:>10,.1f}  ({config.tasks_at_once} tasks at once)",
        "",
        *(f"{name:<32}{count:>20,}" for name, count in plan.counts.items()),
        *(f"{name:<32}{size / 1000:>20,.2f} TB" for name, size in plan.gigabytes.items()),
    ]
    return lines

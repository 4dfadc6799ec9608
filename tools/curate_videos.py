"""Videos to clips: split into scenes, judge them, write the good ones with what is known of them.

Every scene gets a row in OUTPUT/rows.parquet, kept or not; OUTPUT/clips/*.tar holds the kept ones, OUTPUT/report.html
shows what was dropped and why. Work is done in parts: started again, the program makes those that are missing.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
from rich.console import Console

from megatron_ext.config import BadSamples, InputError, as_dict, load, run_program
from megatron_ext.config.runtime import DeviceName
from megatron_ext.curate import KEPT, UNREADABLE
from megatron_ext.curate.clip_parts import SCHEMA, JudgedVideo, write_part
from megatron_ext.curate.clips import EncodingConfig
from megatron_ext.curate.scenes import ScenesConfig
from megatron_ext.curate.table import PartTable, Row
from megatron_ext.curate.video_filters import VideoFiltersConfig
from megatron_ext.curate.video_work import curate, prepare
from megatron_ext.curate.workers import Workers
from megatron_ext.media import Sample, list_samples
from megatron_ext.media.array import shard_of_job

# The processes import this module too: torch, megatron-core and matplotlib are imported where the program needs them.
if TYPE_CHECKING:
    from megatron_ext.curate.clip_rating import ClipRating


@dataclass(frozen=True, kw_only=True)
class CurateVideosConfig:
    """Curate videos: folders or WebDataset tars of videos in; clips, a table of all scenes and a report out."""

    inputs: list[str]
    """Folders of videos, WebDataset tars, single videos, and glob patterns of these; pictures are passed over."""

    output: str
    """Folder for clips/*.tar, rows.parquet and report.html."""

    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    """How a video is split."""

    filters: VideoFiltersConfig = field(default_factory=VideoFiltersConfig)
    """Which clips are kept."""

    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    """How parts of videos are written."""

    aesthetic_clip: str | None = None
    """Folder of CLIP ViT-L/14 as transformers saves it; null turns the aesthetic filter off."""

    aesthetic_head: str | None = None
    """File of LAION's aesthetic head for it (.pth or .safetensors)."""

    device: DeviceName = "auto"
    """Where the aesthetic score is computed; auto takes CUDA when a GPU is visible."""

    workers: int = 2
    """Processes that decode, judge and encode, each with one thread; 0 does it in this process."""

    part_size: int = 32
    """Videos of one part; an interruption loses at most this much work."""

    max_bad_fraction: float = 0.01
    """Largest share of the videos that may be unreadable; more of them stop."""

    overwrite: bool = False
    """Remove what output holds when it was made with other inputs or options; false refuses."""

    shard_index: int | None = None
    """Which shard of the parts this process makes, from 0; null takes it from Slurm's job array, else 0."""

    num_shards: int | None = None
    """Number of shards; null takes it from Slurm's job array, else 1."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise InputError("inputs is empty: give folders or tars of videos")
        if (self.aesthetic_clip is None) != (self.aesthetic_head is None):
            raise InputError(
                f"aesthetic_clip = {self.aesthetic_clip}, aesthetic_head = {self.aesthetic_head}: give both or neither"
            )
        if self.part_size < 1:
            raise InputError(f"part_size = {self.part_size}: must be positive")


def made_by(config: CurateVideosConfig, samples: list[Sample], rating: "ClipRating | None") -> dict:
    """What shapes rows and clips; with other values finished parts cannot stay."""
    listing = [(sample.key, sample.media.size, sample.media.stamp) for sample in samples]
    return {
        "program": "curate_videos",
        "scenes": as_dict(config.scenes),
        "filters": as_dict(config.filters),
        "encoding": as_dict(config.encoding),
        "aesthetic_predictor": rating.identity if rating else None,
        "part_size": config.part_size,
        "inputs_sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
    }


def main(argv: list[str]) -> None:
    """Run the program with the arguments after its name."""
    config = load(CurateVideosConfig, argv, prog="curate_videos")
    console = Console(highlight=False)
    shard, shards = shard_of_job(config.shard_index, config.num_shards)
    samples = [sample for sample in list_samples(config.inputs) if sample.kind == "video"]
    if not samples:
        raise InputError(f"inputs {config.inputs} hold no video: give folders or tars of videos")
    parts = [samples[first : first + config.part_size] for first in range(0, len(samples), config.part_size)]
    rating = load_rating(config)
    table = PartTable(config.output, SCHEMA, made_by(config, samples, rating), overwrite=config.overwrite)
    bad = BadSamples(config.max_bad_fraction)
    mine = range(shard, len(parts), shards)
    total = sum(len(parts[part]) for part in mine)
    todo = [part for part in mine if not table.is_done(part)]
    for part in sorted(set(mine) - set(todo)):
        _add_unreadable(bad, table.read(part, ["source", "verdict", "detail"]).to_pylist())
    bad.check(total)
    if todo:
        _make(config, table, {part: parts[part] for part in todo}, rating, bad, total, console)
    for line in bad.lines():
        console.print(line, markup=False, soft_wrap=True)
    missing = sum(not table.is_done(part) for part in range(len(parts)))
    if missing:
        console.print(f"{config.output}: {missing} of {len(parts)} parts are other shards' and missing", soft_wrap=True)
    else:
        _merge(config, table, len(parts), console)


def load_rating(config: CurateVideosConfig) -> "ClipRating | None":
    """The aesthetic predictor, where its weights are given."""
    if config.aesthetic_clip is None or config.aesthetic_head is None:
        return None
    from megatron_ext.curate.clip_rating import ClipRating

    return ClipRating(config.aesthetic_clip, config.aesthetic_head, config.device)


def _make(
    config: CurateVideosConfig,
    table: PartTable,
    parts: dict[int, list[Sample]],
    rating: "ClipRating | None",
    bad: BadSamples,
    total: int,
    console: Console,
) -> None:
    """Curate and write the videos of `parts`."""
    from megatron_ext.observe.progress import progress

    count = sum(map(len, parts.values()))
    with (
        Workers(config.workers, prepare) as workers,
        progress("curate", count, "videos", console) as advance,
    ):
        samples = itertools.chain.from_iterable(parts.values())
        videos = curate(samples, workers, config.scenes, config.filters, config.encoding, rating)
        for part, held in parts.items():
            rows = write_part(table, part, _advancing(itertools.islice(videos, len(held)), advance))
            _add_unreadable(bad, rows)
            bad.check(total)  # the parts so far stay: with a larger fraction the work goes on


def _advancing(videos: Iterator[JudgedVideo], advance: Callable[[int], None]) -> Iterator[JudgedVideo]:
    for video in videos:
        yield video
        advance(1)


def _add_unreadable(bad: BadSamples, rows: list[Row]) -> None:
    for row in rows:
        if row["verdict"] == UNREADABLE:
            bad.add(row["source"], row["detail"])


def _merge(config: CurateVideosConfig, table: PartTable, count: int, console: Console) -> None:
    """All parts are there: write what is of all of them. Two shards that end together write the same."""
    from megatron_ext.curate.clip_page import write_clip_page

    merged, page = table.folder / "rows.parquet", table.folder / "report.html"
    if merged.exists() and page.exists():
        console.print(f"{config.output} is finished and nothing has changed: reused", soft_wrap=True)
    else:
        table.write_merged(table.read(part) for part in range(count))
        write_clip_page(pq.read_table(merged), config.filters, off_filters(config), page)
    rows = pq.read_table(merged, columns=["verdict", "reason", "path", "start_s", "end_s"]).to_pylist()
    kept = [row for row in rows if row["verdict"] == KEPT]
    used = {row["path"] for row in kept}
    for tar in (table.folder / "clips").glob("clips-*.tar"):
        if str(tar) not in used:  # of an earlier making
            tar.unlink()
    hours = sum(row["end_s"] - row["start_s"] for row in kept) / 3600
    console.print(f"{merged}: {len(kept)} of {len(rows)} scenes were kept, {hours:.2f} hours", soft_wrap=True)
    for reason, dropped in Counter(row["reason"] for row in rows if row["reason"]).most_common():
        console.print(f"dropped by {reason}: {dropped}", soft_wrap=True)
    for name, why in off_filters(config).items():
        console.print(f"filter {name} was off: {why}", soft_wrap=True)
    if not kept:
        raise InputError(f"none of the {len(rows)} scenes was kept: {page} shows why; loosen filters")


def off_filters(config: CurateVideosConfig) -> dict[str, str]:
    """Filters that are not asked, and why."""
    off = {}
    if config.aesthetic_clip is None:
        off["aesthetic"] = "no weights were given; give aesthetic_clip and aesthetic_head"
    if config.filters.max_text is None:
        off["text"] = "filters.max_text is null; give a share, 0.1 for example"
    return off


def cli() -> None:
    """Entry of the console script."""
    run_program(main)


if __name__ == "__main__":
    run_program(main)

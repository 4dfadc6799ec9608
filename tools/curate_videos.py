"""Videos to clips: split into scenes, judge them, write the good ones with what is known of them.

Every scene gets a row in OUTPUT/rows.parquet, kept or not; OUTPUT/clips/*.tar holds the kept ones, OUTPUT/report.html
shows what was dropped and why. Work is done in parts: started again, the program makes those that are missing.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from rich.console import Console

from megatron_ext.config import BadSamples, InputError, as_dict, load, run_program
from megatron_ext.config.section import Count, Name, NonNegative, Number, Share
from megatron_ext.curate import KEPT, UNREADABLE
from megatron_ext.curate.clip_page import write_clip_page
from megatron_ext.curate.clip_parts import CLIPS, SCHEMA, JudgedVideo, write_part
from megatron_ext.curate.clips import EncodingConfig
from megatron_ext.curate.inputs import Piece, pieces_of
from megatron_ext.curate.predictor import AestheticConfig, load_predictor
from megatron_ext.curate.scenes import ScenesConfig
from megatron_ext.curate.table import PartTable, Row
from megatron_ext.curate.text import check_installed
from megatron_ext.curate.video_filters import VideoFiltersConfig
from megatron_ext.curate.video_work import VideoCurator
from megatron_ext.files import check_folder
from megatron_ext.media import Fault, Sample
from megatron_ext.media.array import ShardConfig, shard_of_job
from megatron_ext.observe.progress import progress

if TYPE_CHECKING:
    from megatron_ext.curate.aesthetic import AestheticPredictor


@dataclass(frozen=True, kw_only=True)
class CurateVideosConfig(ShardConfig):
    """Curate videos: folders or WebDataset tars of videos in; clips, a table of all scenes and a report out."""

    inputs: list[Name]
    """Folders of videos, WebDataset tars, manifests, single videos, and patterns of these; pictures are passed over."""

    output: Name
    """Folder for clips/*.tar, rows.parquet and report.html."""

    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    """How a video is split."""

    filters: VideoFiltersConfig = field(default_factory=VideoFiltersConfig)
    """Which clips are kept."""

    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    """How parts of videos are written."""

    aesthetic: AestheticConfig = field(default_factory=AestheticConfig)
    """Weights of the aesthetic predictor."""

    workers: Number = 2
    """Processes that decode, judge and encode; 0 does it in this one."""

    worker_timeout_s: NonNegative = 7200.0
    """Seconds after which a video is given up, as unreadable, over which such a process hangs; 0 waits for ever."""

    part_size: Count = 32
    """Videos of one part, of what is no tar (a tar is a part); an interruption loses at most this much work."""

    merge_only: bool = False
    """Curate nothing: write the table and the report of what the jobs of a larger num_shards have made."""

    max_bad_fraction: Share = 0.01
    """Largest share of the videos that may be unreadable; more of them stop."""

    overwrite: bool = False
    """Remove what output holds when it was made with other inputs or options; false refuses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inputs:
            raise InputError("inputs is empty: give folders or tars of videos")


def made_by(config: CurateVideosConfig, digest: str, rater: "AestheticPredictor | None") -> dict[str, Any]:
    """What shapes rows and clips; with other values finished parts cannot stay."""
    return {
        "program": "curate_videos",
        "inputs_sha256": digest,
        "part_size": config.part_size,
        "scenes": as_dict(config.scenes),
        "filters": as_dict(config.filters),
        "encoding": as_dict(config.encoding),
        "aesthetic_predictor": rater and rater.identity,
    }


def main(argv: list[str]) -> None:
    """Run the program with the arguments after its name."""
    config = load(CurateVideosConfig, argv, prog="curate_videos")
    check_folder(config.output, "output")
    console = Console(highlight=False)
    shard, shards = shard_of_job(config.shard_index, config.num_shards)
    if config.overwrite and shards > 1:
        raise InputError(
            f"overwrite with {shards} shards would remove what other jobs wrote: remove {config.output} by hand"
        )
    pieces, digest = pieces_of(config.inputs, config.part_size)
    rater = load_predictor(config.aesthetic, rates=not config.merge_only)
    table = PartTable(config.output, SCHEMA, made_by(config, digest, rater), overwrite=config.overwrite)
    if config.merge_only:
        table.check_complete(len(pieces))
        _merge(config, table, len(pieces), console)
        return
    own = {number: pieces[number] for number in range(shard, len(pieces), shards)}
    bad, total = BadSamples(config.max_bad_fraction), 0
    for number in own:
        if table.is_done(number):
            total += _count_bad(bad, table.read(number, ["clip_of", "source", "verdict", "detail"]).to_pylist())
    _make(config, table, {n: piece for n, piece in own.items() if not table.is_done(n)}, rater, bad, total, console)
    for line in bad.lines():
        console.print(line, markup=False, soft_wrap=True)
    if shards == 1:
        _merge(config, table, len(pieces), console)
    else:
        console.print(f"shard {shard} of {shards} is curated; when all are, run with merge_only: true", soft_wrap=True)


def _make(
    config: CurateVideosConfig,
    table: PartTable,
    pieces: dict[int, Piece],
    rater: "AestheticPredictor | None",
    bad: BadSamples,
    total: int,
    console: Console,
) -> None:
    """Curate and write the parts that are missing; of those that are there, `total` videos were looked at."""
    entries = {number: _videos_of(piece) for number, piece in pieces.items()}
    count = sum(map(len, entries.values()))
    total += count
    bad.check(total)
    if not pieces:
        return
    if config.filters.max_text is not None:
        check_installed("filters.max_text: null")
    workers = {"workers": config.workers, "timeout_s": config.worker_timeout_s}
    curator = VideoCurator(config.scenes, config.filters, config.encoding, rater, **workers)
    with curator, progress("curate", count, "videos", console) as advance:
        videos = curator.videos(itertools.chain.from_iterable(entries.values()))
        for number, held in entries.items():
            rows = write_part(table, number, _advancing(itertools.islice(videos, len(held)), advance))
            _count_bad(bad, rows)
            bad.check(total)  # the parts so far stay: with a larger fraction the work goes on


def _videos_of(piece: Piece) -> list[Sample | Fault]:
    return [entry for entry in piece.entries() if isinstance(entry, Fault) or entry.kind == "video"]


def _advancing(videos: Iterator[JudgedVideo], advance: Callable[[int], None]) -> Iterator[JudgedVideo]:
    for video in videos:
        yield video
        advance(1)


def _count_bad(bad: BadSamples, rows: list[Row]) -> int:
    """Add the unreadable videos of a part; the number of all its videos."""
    unreadable = [row for row in rows if row["verdict"] == UNREADABLE]
    for row in unreadable:  # one of each; two may have one key
        bad.add(row["source"], row["detail"])
    return len(unreadable) + len({row["clip_of"] for row in rows if row["verdict"] != UNREADABLE})


def _merge(config: CurateVideosConfig, table: PartTable, count: int, console: Console) -> None:
    """All parts are there: write what is of all of them."""
    merged, page = table.folder / "rows.parquet", table.folder / "report.html"
    if merged.exists() and page.exists():
        console.print(f"{config.output} is finished and nothing has changed: reused", soft_wrap=True)
    else:
        table.write_merged(table.read(part) for part in range(count))
        write_clip_page(pq.read_table(merged), config.filters, off_filters(config), page)
    rows = pq.read_table(merged, columns=["verdict", "reason", "path", "start_s", "end_s"]).to_pylist()
    kept = [row for row in rows if row["verdict"] == KEPT]
    used = {row["path"] for row in kept}
    for tar in (table.folder / CLIPS).glob("clips-*.tar"):
        if f"{CLIPS}/{tar.name}" not in used:  # of an earlier making
            tar.unlink(missing_ok=True)
    for leftover in (table.folder / CLIPS).glob(".*.tmp"):  # of jobs that were killed
        leftover.unlink(missing_ok=True)
    hours = sum(row["end_s"] - row["start_s"] for row in kept) / 3600
    console.print(f"{merged}: {len(kept)} of {len(rows)} scenes were kept, {hours:.2f} hours", soft_wrap=True)
    for reason, dropped in Counter(row["reason"] for row in rows if row["reason"]).most_common():
        console.print(f"dropped by {reason}: {dropped}", soft_wrap=True)
    for name, why in off_filters(config).items():
        console.print(f"filter {name} was off: {why}", soft_wrap=True)
    if not rows:
        raise InputError(f"inputs {config.inputs} hold no video: give folders or tars of videos")
    if not kept:
        raise InputError(f"none of the {len(rows)} scenes was kept: {page} shows why; loosen filters")


def off_filters(config: CurateVideosConfig) -> dict[str, str]:
    """Filters that are not asked, and why."""
    off = {}
    if config.aesthetic.clip is None:
        off["aesthetic"] = "it needs weights: give aesthetic.clip and aesthetic.head"
    if config.filters.max_text is None:
        off["text"] = "filters.max_text is null; give a share, 0.1 for example"
    return off


def cli() -> None:
    """Entry of the console script."""
    run_program(main)


if __name__ == "__main__":
    run_program(main)

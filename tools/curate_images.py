"""Which of many pictures are worth training on: folders, tars or manifests in; a table of verdicts, a page and what was
kept out.

Started again, it takes up where it was interrupted. Many jobs may measure one output (`shard_index`, `num_shards`, or a
job array of Slurm); one then decides about duplicates, and many may write the tars:

    emu3-curate-images --config curate.yaml --stage measure     # an array
    emu3-curate-images --config curate.yaml --stage decide      # one job, when all of these are through
    emu3-curate-images --config curate.yaml --stage write       # an array, with kept: tars only
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from megatron_ext.config import InputError, as_dict, load, run_program
from megatron_ext.config.section import Count, Name, NonNegative, Number
from megatron_ext.curate.decide import REASONS, Summary, decide
from megatron_ext.curate.inputs import Piece, pieces_of
from megatron_ext.curate.kept import plan_tars, planned_tars, write_jsonl, write_parquet, write_tars
from megatron_ext.curate.picture_filters import PictureFiltersConfig
from megatron_ext.curate.picture_page import filters_off, write_picture_page
from megatron_ext.curate.picture_rows import NO_PICTURE, SCHEMA, PictureMeter
from megatron_ext.curate.predictor import AestheticConfig, load_predictor
from megatron_ext.curate.table import PartTable
from megatron_ext.curate.text import check_installed
from megatron_ext.curate.verdict import UNREADABLE
from megatron_ext.files import check_folder
from megatron_ext.media.array import ShardConfig, shard_of_job
from megatron_ext.observe.progress import progress

if TYPE_CHECKING:
    from megatron_ext.curate.aesthetic import AestheticPredictor


@dataclass(frozen=True, kw_only=True)
class BatchedAestheticConfig(AestheticConfig):
    """LAION's aesthetic predictor, for many pictures at once."""

    batch_size: Count = 32
    """Pictures rated at once."""


@dataclass(frozen=True, kw_only=True)
class CurateImagesConfig(ShardConfig):
    """Curate pictures: folders, tars or manifests in; a table of verdicts, a page and what was kept out."""

    inputs: list[Name]
    """Folders in the layout of img2dataset's "files" output, WebDataset tars, manifests, single files, and patterns of
    these."""

    output: Name
    """Folder for rows.parquet, report.html and what is kept."""

    filters: PictureFiltersConfig = field(default_factory=PictureFiltersConfig)
    """What is kept."""

    aesthetic: BatchedAestheticConfig = field(default_factory=BatchedAestheticConfig)
    """Weights of the aesthetic predictor."""

    kept: Literal["jsonl", "parquet", "tars"] = "jsonl"
    """A list of the kept pictures as JSON lines, the same as Parquet with all scores, or WebDataset tars of them."""

    pictures_per_tar: Count = 10_000
    """Pictures of one tar, with kept: tars."""

    piece_size: Count = 1000
    """Inputs measured and written at once, of what is no tar (a tar is a piece); an interruption loses at most this
    much work."""

    workers: Number = 2
    """Processes that decode pictures and look for text; 0 does it in this one."""

    worker_timeout_s: NonNegative = 600.0
    """Seconds after which a picture is given up, as unreadable, over which such a process hangs; 0 waits for ever."""

    stage: Literal["all", "measure", "decide", "write"] = "all"
    """What to do; all measures only where there are several shards, because the others must be waited for."""

    overwrite: bool = False
    """Remove what output holds when it was made from other inputs or with other options; false refuses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inputs:
            raise InputError("inputs is empty: give folders, tars or manifests of pictures")


def main(argv: list[str]) -> None:
    """Run the program with the arguments after its name."""
    config = load(CurateImagesConfig, argv, prog="curate_images")
    check_folder(config.output, "output")
    console = Console(highlight=False)
    shard_index, num_shards = shard_of_job(config.shard_index, config.num_shards)
    if config.overwrite and (num_shards > 1 or config.stage in ("decide", "write")):
        raise InputError(
            f"overwrite with stage {config.stage} and {num_shards} shards would remove what other jobs wrote: remove "
            f"{config.output} by hand"
        )
    if config.stage == "write":
        _write(config, shard_index, num_shards, console)
        return
    pieces, digest = pieces_of(config.inputs, config.piece_size)
    predictor = load_predictor(config.aesthetic, rates=config.stage in ("all", "measure"))
    table = PartTable(config.output, SCHEMA, _made_by(config, digest, predictor), overwrite=config.overwrite)
    if config.stage in ("all", "measure"):
        own = [(number, piece) for number, piece in enumerate(pieces) if number % num_shards == shard_index]
        _measure(config, own, predictor, table, console)
    if config.stage == "decide" or (config.stage == "all" and num_shards == 1):
        summary = _decide(config, table, len(pieces), is_rated=predictor is not None)
        _print_summary(config, summary, predictor is not None, console)
        if config.kept == "tars" and config.stage == "all":
            _write(config, 0, 1, console)
    elif num_shards > 1:
        console.print(
            f"shard {shard_index} of {num_shards} is measured; when all are, run --stage decide", soft_wrap=True
        )


def _made_by(config: CurateImagesConfig, digest: str, predictor: "AestheticPredictor | None") -> dict[str, Any]:
    """What shapes the measured rows; duplicates are decided later, from any of their thresholds."""
    filters = as_dict(config.filters)
    filters = {name: filters[name] for name in filters if name not in ("drop_duplicates", "max_hash_distance")}
    return {
        "inputs_sha256": digest,
        "piece_size": config.piece_size,
        "filters": filters,
        "aesthetic_predictor": predictor and predictor.identity,
        "batch_size": predictor and config.aesthetic.batch_size,
    }


def _measure(
    config: CurateImagesConfig,
    own: list[tuple[int, Piece]],
    predictor: "AestheticPredictor | None",
    table: PartTable,
    console: Console,
) -> None:
    """Measure the pieces of this job that are not yet measured."""
    left = [(number, piece) for number, piece in own if not table.is_done(number)]
    if len(left) < len(own):
        console.print(
            f"{config.output}: {len(own) - len(left)} of {len(own)} pieces were measured before", soft_wrap=True
        )
    if not left:
        return
    if "text and colour" not in filters_off(config.filters, is_rated=predictor is not None):
        check_installed("filters.text_and_colour: off")
    start, measured = time.monotonic(), 0
    workers = PictureMeter(
        config.filters,
        predictor,
        batch_size=config.aesthetic.batch_size,
        workers=config.workers,
        timeout_s=config.worker_timeout_s,
    )
    with workers as meter, _megabytes("measure", [piece.size() for _, piece in left], console) as (advance, finish):
        for number, piece in left:
            rows = meter.rows(piece.entries(), advance)
            table.write(number, rows)
            measured += len(rows)
            finish()
    seconds = time.monotonic() - start
    console.print(f"measured {measured:,} inputs in {seconds:.1f} s, {measured / seconds:.1f} a second", soft_wrap=True)


@contextlib.contextmanager
def _megabytes(
    label: str, sizes: list[int], console: Console
) -> Iterator[tuple[Callable[[int], None], Callable[[], None]]]:
    """Progress in megabytes over pieces of `sizes` bytes, because how many pictures a tar holds is not yet known: two
    functions, to tell of bytes and of the end of a piece."""
    total = max(1, sum(sizes) // 10**6)
    shown = done = 0
    ends = itertools.accumulate(sizes)
    with progress(label, total, "MB", console) as report:

        def advance(count: int) -> None:
            nonlocal done, shown
            done += count
            if (now := min(done // 10**6, total)) > shown:
                report(now - shown)
                shown = now

        def finish() -> None:
            advance(next(ends) - done)

        yield advance, finish
        if shown < total:
            report(total - shown)


def _decide(config: CurateImagesConfig, table: PartTable, count: int, *, is_rated: bool) -> Summary:
    """Duplicates, the merged table, the list of what is kept, the page."""
    table.check_complete(count)
    folder, rows = Path(config.output), Path(config.output) / "rows.parquet"
    for earlier in folder.glob("kept.*"):
        earlier.unlink()  # a list of other verdicts, perhaps
    summary = decide(table, count, config.filters)
    if config.kept == "jsonl":
        write_jsonl(rows, folder / "kept.jsonl")
    elif config.kept == "parquet":
        write_parquet(rows, folder / "kept.parquet")
    else:
        plan_tars(folder, config.pictures_per_tar)
    off = filters_off(config.filters, is_rated=is_rated)
    write_picture_page(folder / "report.html", summary, config.filters, off, f"Curation: {folder.resolve().name}")
    return summary


def _print_summary(config: CurateImagesConfig, summary: Summary, is_rated: bool, console: Console) -> None:
    reasons = summary.reasons
    total = sum(reasons.values())
    for filter, why in filters_off(config.filters, is_rated=is_rated).items():
        console.print(f"filter {filter} was off: {why}", soft_wrap=True)
    for reason in REASONS:
        if reasons[reason]:
            console.print(f"dropped {reasons[reason]:,}: {reason}", soft_wrap=True)
    console.print(
        f"{config.output}: kept {reasons['']:,} of {total:,} inputs, {summary.rescued:,} of them rescued; see "
        f"{Path(config.output) / 'report.html'}",
        soft_wrap=True,
    )
    if total and reasons[UNREADABLE] + reasons[NO_PICTURE] == total:
        raise InputError(f"none of the {total:,} inputs of {config.inputs} is a readable picture")


def _write(config: CurateImagesConfig, shard_index: int, num_shards: int, console: Console) -> None:
    """The tars of this job."""
    if config.kept != "tars":
        raise InputError(f"stage write with kept: {config.kept}: lists are written by the stage decide; set kept: tars")
    folder = Path(config.output)
    own = len(range(shard_index, planned_tars(folder)["tars"], num_shards))
    if own:
        with progress("write", own, "tars", console) as advance:
            write_tars(folder, shard_index, num_shards, advance)
    console.print(f"{folder / 'kept'}: {own} tars are written", soft_wrap=True)


def cli() -> None:
    """Entry of the console script."""
    run_program(main)


if __name__ == "__main__":
    run_program(main)

"""The page of a curation of videos."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from megatron_ext.curate.clip_parts import MEASURED
from megatron_ext.curate.report import CurationPage, Score, choose_examples, write_page
from megatron_ext.curate.table import Row
from megatron_ext.curate.verdict import KEPT, UNREADABLE
from megatron_ext.curate.video_filters import FILTERS, VideoFiltersConfig
from megatron_ext.media import MediaError
from megatron_ext.media.samples import Extent
from megatron_ext.media.video import Video

EXAMPLES = 6
"""Clips shown of each kind."""


def write_clip_page(rows: pa.Table, filters: VideoFiltersConfig, off: Mapping[str, str], path: Path) -> None:
    """The page of all `rows` (schema `clip_parts.SCHEMA`); `off` tells which filters were off and why."""
    verdicts = rows["verdict"].to_pylist()
    reasons = Counter(rows["reason"].to_pylist())
    length = _column(rows, "end_s") - _column(rows, "start_s")
    is_kept = np.array([verdict == KEPT for verdict in verdicts], bool)
    page = CurationPage(
        title="Curation of videos",
        lead="Scenes of videos, and which of them were kept as clips.",
        facts={
            "videos": f"{pc.count_distinct(rows['clip_of']).as_py():,}",
            "scenes": f"{len(rows) - reasons[UNREADABLE]:,}",
            "clips kept": f"{is_kept.sum():,}",
            "hours of scenes": f"{np.nansum(length) / 3600:,.2f}",
            "hours of clips": f"{np.nansum(length[is_kept]) / 3600:,.2f}",
        },
        funnel=[
            ("scenes and unreadable videos", len(rows)),
            *((name, reasons[name]) for name in (UNREADABLE, *FILTERS)),
        ],
        off=off,
        scores=_scores(rows, is_kept, length, filters),
        examples=_examples(rows),
    )
    write_page(page, path, functools.partial(middle_frame, path.parent))


def middle_frame(folder: Path, row: Row) -> Image.Image | None:
    """The frame in the middle of a row's clip, which is a file of its own in `folder` if it was kept; None of an
    unreadable one."""
    if row["start_s"] is None:
        return None
    is_kept = row["verdict"] == KEPT
    span = (0.0, row["end_s"] - row["start_s"]) if is_kept else (row["start_s"], row["end_s"])
    path = folder / row["path"] if is_kept else Path(row["path"])
    extent = Extent(path=path, offset=row["offset"], size=row["size"], stamp=0)
    try:
        with Video(extent.open()) as video:
            frame = next(video.frames_at(video.timeline.shown_at([sum(span) / 2])), None)
            return None if frame is None else Image.fromarray(frame.pixels(160))
    except MediaError:
        return None


def _scores(rows: pa.Table, is_kept: np.ndarray, length: np.ndarray, filters: VideoFiltersConfig) -> Sequence[Score]:
    bounds: dict[str, tuple[str, Any, dict[float, str], str]] = {
        "motion": (
            "motion: mean optical flow (shorter edges per half second)",
            _column(rows, "motion"),
            {filters.min_motion: "least", filters.max_motion: "most"},
            "Frames at 2 per second with a shorter edge of 256 pixels.",
        ),
        "text": (
            "share of the picture that text covers",
            _column(rows, "text"),
            {} if filters.max_text is None else {filters.max_text: "most"},
            "Mean of the same frames.",
        ),
        "aesthetic": (
            "aesthetic score",
            _column(rows, "aesthetic"),
            {filters.min_aesthetic: "least"},
            "Of the worst of three frames.",
        ),
        "duration": (
            "length (s)",
            length,
            {filters.min_clip_s: "least"},
            "From cut to cut, or of a part of a long scene.",
        ),
    }
    return [
        Score(label=label, kept=values[is_kept], dropped=values[~is_kept], thresholds=marks, caption=caption)
        for label, values, marks, caption in (bounds[name] for name in (*MEASURED, "duration"))
    ]


def _examples(rows: pa.Table) -> dict[str, Sequence[Row]]:
    shown = {"Kept": _where(rows, "verdict", KEPT)}
    for name in FILTERS:
        shown[f"Dropped: {name}"] = _where(rows, "reason", name)
    return {heading: choose_examples(found, EXAMPLES) for heading, found in shown.items()}


def _where(rows: pa.Table, column: str, value: str) -> list[Row]:
    return rows.filter(pc.equal(rows[column], value)).to_pylist()


def _column(rows: pa.Table, name: str) -> np.ndarray:
    """A column of numbers; NaN where there is none."""
    return np.array(rows[name].to_pylist(), dtype=np.float64)

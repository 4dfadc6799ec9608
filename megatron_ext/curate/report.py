"""The page of a curation: how many inputs each filter dropped, histograms of the scores, samples of both kinds."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_ext.curate.table import Row, replace_file
from megatron_ext.curate.verdict import KEPT
from megatron_ext.observe.report import Card, Report, histogram

THUMBNAIL_PIXELS = 160
"""Longer side of a thumbnail."""

PER_CARD = 3
"""Thumbnails side by side."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A measured quantity: one histogram."""

    label: str
    """What the axis says, with the unit."""

    kept: np.ndarray
    """[N] values of the samples that were kept; NaN where it was not measured."""

    dropped: np.ndarray
    """[M] values of the others that could be measured."""

    thresholds: Mapping[float, str] = field(default_factory=dict)
    """Threshold -> its label."""

    caption: str = ""
    """How it is measured."""


@dataclass(frozen=True, kw_only=True)
class CurationPage:
    """What a page tells."""

    title: str
    lead: str
    """The sentence under the title."""

    facts: Mapping[str, str]
    """Figures at a glance."""

    funnel: Sequence[tuple[str, int]]
    """(filter, inputs it dropped) in the order in which filters are asked; the first entry is (what, all inputs)."""

    off: Mapping[str, str]
    """Filter -> why it was off, and how to turn it on."""

    scores: Sequence[Score]
    examples: Mapping[str, Sequence[Row]]
    """Heading -> rows to show; `choose_examples` picks them."""


def choose_examples(rows: Sequence[Row], count: int) -> list[Row]:
    """`count` of the rows, by a hash of their keys: neither the first ones nor others each time."""
    return sorted(rows, key=lambda row: hashlib.sha256(row["key"].encode()).digest())[:count]


def write_page(page: CurationPage, path: Path, picture_of: Callable[[Row], Image.Image | None]) -> Path:
    """Write the page; `picture_of` a row is shown small, None leaves its place empty."""
    report = Report(page.title, page.lead)
    report.facts(page.facts)
    for filter, why in page.off.items():
        report.note(f"Filter {filter} was off: {why}")
    report.section("Funnel", "What each filter dropped of what the filters above it left.")
    report.table(("", "dropped", "left", "share left"), funnel_rows(page.funnel))
    report.section("Scores", "Dashed lines are thresholds.")
    for score in page.scores:
        _add_histogram(report, score)
    for heading, rows in page.examples.items():
        if rows:
            report.section(heading)
            report.cards(_cards(rows, picture_of))
    replace_file(path, report.write)
    return path


def funnel_rows(funnel: Sequence[tuple[str, int]]) -> list[tuple[str, int, int, str]]:
    """(filter, dropped, left, share of all inputs left)."""
    (what, total), *steps = funnel
    rows, left = [(what, 0, total, "100.0 %")], total
    for filter, dropped in steps:
        left -= dropped
        rows.append((filter, dropped, left, f"{left / max(total, 1):.1%}".replace("%", " %")))
    return rows


def _add_histogram(report: Report, score: Score) -> None:
    series = {KEPT: _finite(score.kept), "dropped": _finite(score.dropped)}
    if sum(map(len, series.values())) == 0:
        report.text(f"{score.label}: not measured.")
        return
    figure = histogram(series, x_label=score.label, y_label="inputs", marks=score.thresholds)
    report.figure(figure, score.caption)


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _cards(rows: Sequence[Row], picture_of: Callable[[Row], Image.Image | None]) -> list[Card]:
    cards = []
    for first in range(0, len(rows), PER_CARD):
        shown = rows[first : first + PER_CARD]
        # Two keys may look alike once shortened; a number in front keeps the labels apart.
        labels = [f"{first + place + 1}. {_short(row['key'])}" for place, row in enumerate(shown)]
        pictures = {label: _thumbnail(picture_of(row)) for label, row in zip(labels, shown, strict=True)}
        texts = {
            label.partition(" ")[0]: row["detail"] for label, row in zip(labels, shown, strict=True) if row["detail"]
        }
        cards.append(Card(pictures=pictures, texts=texts))
    return cards


def _short(key: str, most: int = 28) -> str:
    return key if len(key) <= most else "…" + key[1 - most :]


def _thumbnail(picture: Image.Image | None) -> Image.Image | None:
    if picture is not None:
        picture = picture.convert("RGB")
        picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    return picture

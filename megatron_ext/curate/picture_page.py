"""The page of a curation of pictures."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_ext.curate.decide import REASONS, Summary
from megatron_ext.curate.picture_filters import PictureFiltersConfig
from megatron_ext.curate.report import CurationPage, Score, write_page
from megatron_ext.curate.table import Row
from megatron_ext.curate.verdict import KEPT
from megatron_ext.media import MediaError, decode_picture
from megatron_ext.media.samples import Extent

NOT_RATED = "no weight files were given: set aesthetic.clip and aesthetic.head to LAION's predictor."
NOT_ASKED = "text_and_colour is off."
NONE_BELOW = "they judge pictures below the aesthetic score, and none has one; text_and_colour: require judges all."


def filters_off(filters: PictureFiltersConfig, *, is_rated: bool) -> dict[str, str]:
    """Filter -> why it is off and how to turn it on."""
    off = {} if is_rated else {"aesthetic": NOT_RATED}
    if filters.text_and_colour == "off":
        off["text and colour"] = NOT_ASKED
    elif filters.text_and_colour == "rescue" and not is_rated:
        off["text and colour"] = NONE_BELOW
    if not filters.drop_duplicates:
        off["duplicates"] = "drop_duplicates is false."
    elif filters.max_hash_distance is None:
        off["near duplicates"] = "max_hash_distance is null."
    return off


def write_picture_page(
    path: Path, summary: Summary, filters: PictureFiltersConfig, off: Mapping[str, str], title: str
) -> None:
    """Write the page of a decided table."""
    reasons = summary.reasons
    total, kept = sum(reasons.values()), reasons[""]
    headings = {"": "Kept", "rescued": "Kept although below the aesthetic score"}
    headings |= {reason: f"Dropped: {reason.replace('_', ' ')}" for reason in REASONS}
    page = CurationPage(
        title=title,
        lead="Which pictures were kept, which were dropped, and why.",
        facts={
            "inputs": f"{total:,}",
            KEPT: f"{kept:,}",
            "of all inputs": f"{kept / max(total, 1):.1%}".replace("%", " %"),
            "of these rescued": f"{summary.rescued:,}",
        },
        funnel=[("inputs", total), *((reason.replace("_", " "), reasons[reason]) for reason in REASONS)],
        off=off,
        scores=[_score(summary, *entry) for entry in _axes(filters)],
        examples={heading: summary.examples.get(reason, []) for reason, heading in headings.items()},
    )
    write_page(page, path, _picture)


def _axes(filters: PictureFiltersConfig) -> list[tuple[str, str, dict[float, str], str]]:
    """(name, label, thresholds, how it is measured)."""
    return [
        ("shorter_side", "shorter side in pixels", {filters.min_side: "least"}, "Upright, as decoded."),
        ("aesthetic", "aesthetic score", {filters.min_aesthetic: "least"}, "LAION's predictor on CLIP's embedding."),
        (
            "text",
            "share of the area under text",
            {filters.max_text: "most"},
            "Boxes of PP-OCR's detector. It is looked for where the verdict hangs on it.",
        ),
        (
            "colour",
            "colour spread",
            {filters.min_colour: "least"},
            "How far colours of equal lightness lie apart in L*a*b*; 0 for shades of grey and of any one tint.",
        ),
    ]


def _score(summary: Summary, name: str, label: str, thresholds: dict[float, str], caption: str) -> Score:
    return Score(
        label=label,
        kept=summary.scores.get((name, True), np.empty(0)),
        dropped=summary.scores.get((name, False), np.empty(0)),
        thresholds=thresholds,
        caption=caption,
    )


def _picture(row: Row) -> Image.Image | None:
    extent = Extent(path=Path(row["path"]), offset=row["offset"], size=row["size"], stamp=0)
    try:
        return Image.fromarray(decode_picture(extent.read())) if extent.size else None
    except MediaError:
        return None

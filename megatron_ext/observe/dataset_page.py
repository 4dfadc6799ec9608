"""A page about indexed datasets: how much of what is in them, documents to read, windows as they are packed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from megatron_ext.data import KINDS, DocumentDataset, PackedDataset
from megatron_ext.data.step_windows import documents_in_window
from megatron_ext.data.survey import PERCENTILES, Lengths
from megatron_ext.observe.elements import Bar, Flow, Strip, StripPart, Words
from megatron_ext.observe.painter import Painter, items_of, spread
from megatron_ext.observe.progress import progress
from megatron_ext.observe.report import Report, curves
from megatron_ext.vocab import DocumentError, IdCounts, Image, Text, decode_document

LONGEST_TEXT = 700
"""Characters of a text on the page."""

POINTS = 200
"""Of a curve of lengths."""


@dataclass(frozen=True, kw_only=True)
class Surveyed:
    """A dataset and what is known of it."""

    name: str
    dataset: DocumentDataset
    counts: IdCounts
    """Its ids by kind, or those of a sample of its documents."""
    share: float
    """Of the windows of a blend; of a dataset on its own 1."""
    packed: PackedDataset | None
    """None where it was not asked how it packs."""

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of text, visual and structure ids."""
        total = max(1, sum(self.counts))
        return tuple(count / total for count in self.counts)

    def row(self) -> dict[str, str | int]:
        """What a table says of it; the same in the terminal and on the page."""
        lengths = Lengths.of(self.dataset.lengths)
        row: dict[str, str | int] = {"dataset": self.name, "documents": len(self.dataset)}
        row["ids"] = self.dataset.manifest.num_ids
        row |= {name: f"{share:.1%}" for name, share in zip(IdCounts._fields, self.shares, strict=True)}
        row |= {f"{share} %": value for share, value in zip(PERCENTILES, lengths.percentiles, strict=True)}
        row |= {"longest": lengths.longest, "share": f"{self.share:.1%}"}
        if self.packed is not None:
            row |= {"windows": len(self.packed), "fill": f"{self.packed.fill:.2%}"}
            row["skipped"] = len(self.packed.index.skipped_documents)
        return row


class DatasetPage:
    """Writes index.html about the datasets of a blend, or one."""

    def __init__(self, surveyed: Sequence[Surveyed], painter: Painter, *, documents: int, windows: int) -> None:
        """`documents` and `windows` of each dataset are shown."""
        self._surveyed = surveyed
        self._painter = painter
        self._documents = documents
        self._windows = windows

    def write(self, path: Path, title: str) -> Path:
        """Write the page."""
        page = Report(title, "Documents as they stand on disk, and windows as training is given them.")
        self._add_numbers(page)
        for one in self._surveyed:
            page.section(f"Documents of {one.name}" if len(self._surveyed) > 1 else "Documents", self._told(one))
            page.flows(self._flows(one))
        if any(one.packed is not None for one in self._surveyed):
            page.section(
                "Windows",
                "Each strip is one window. A gap is where a document begins; a line along the bottom marks a document "
                "of which a part is elsewhere. Point at a stretch to see which document it belongs to.",
            )
        for one in self._surveyed:
            if one.packed is not None:
                fill = f"{len(one.packed):,} windows of {one.packed.seq_length:,} ids, {one.packed.fill:.2%} full"
                page.text(f"{one.name}: {fill}; {self._windows} of them, evenly spread.")
                page.strips([window_strip(one.packed, window) for window in spread(len(one.packed), self._windows)])
        return page.write(path)

    def _told(self, one: Surveyed) -> str:
        drawn = (
            "Their pictures are drawn from their codes by the vision tokenizer."
            if self._painter.vision is not None
            else "Without a vision tokenizer, each code is drawn as a colour of its own."
        )
        return f"{min(self._documents, len(one.dataset)):,} of {len(one.dataset):,}, evenly spread. {drawn}"

    def _add_numbers(self, page: Report) -> None:
        documents = sum(len(one.dataset) for one in self._surveyed)
        ids = sum(one.dataset.manifest.num_ids for one in self._surveyed)
        visual = sum(one.dataset.manifest.visual_ids for one in self._surveyed)
        facts = {"documents": f"{documents:,}", "ids": f"{ids:,}", "of them visual": f"{visual / ids:.1%}"}
        packed = [one.packed for one in self._surveyed if one.packed is not None]
        if packed:
            places = sum(len(one) * one.seq_length for one in packed)
            filled = sum(one.fill * len(one) * one.seq_length for one in packed)
            facts |= {"windows": f"{sum(map(len, packed)):,}", "ids per window": f"{packed[0].seq_length:,}"}
            facts["fill of the windows"] = f"{filled / places:.2%}"
        page.facts(facts)
        page.section("What it is made of", "Ids by kind; the digits of a picture's grid count as text.")
        if len(self._surveyed) > 1:
            page.bars(
                [Bar(label="windows", parts=[(one.name, one.share, f"{one.share:.1%}") for one in self._surveyed])]
            )
        page.bars(
            [
                Bar(
                    label=one.name,
                    parts=[
                        (name, share, f"{share:.1%}") for name, share in zip(IdCounts._fields, one.shares, strict=True)
                    ],
                )
                for one in self._surveyed
            ]
        )
        seen = ("share", *IdCounts._fields)  # in the bars
        rows = [{name: value for name, value in one.row().items() if name not in seen} for one in self._surveyed]
        page.table(list(rows[0]), [list(row.values()) for row in rows])
        figure = curves(
            {one.name: _quantiles(one.dataset.lengths) for one in self._surveyed[:4]},
            x_label="documents, % of all, from the longest", y_label="ids of a document", log_y=True,
        )  # fmt: skip
        page.figure(figure, "Length of documents: half of them are longer than the curve is at 50 %.")

    def _flows(self, one: Surveyed) -> list[Flow]:
        dataset = one.dataset
        chosen = spread(len(dataset), self._documents)
        flows = []
        with progress(f"documents of {one.name}", len(chosen), "documents", Console()) as advance:
            for number in chosen:
                kind = KINDS[dataset.sidecar.kinds[number]]
                try:
                    segments = decode_document(dataset.ids(number), dataset.vocabulary)
                    items = tuple(items_of(segments, dataset.vocabulary, self._painter, LONGEST_TEXT))
                except DocumentError as error:
                    items = (Words(f"{error}; --validate true names all such documents"),)
                facts = f"document {number:,} · {kind} · {dataset.lengths[number]:,} ids"
                flows.append(Flow(title=dataset.sidecar.key(number), kind=kind, facts=facts, items=items))
                advance(1)
        return flows


def window_strip(packed: PackedDataset, window: int) -> Strip:
    """A window's documents by the kinds of their segments; what is left is padding."""
    parts = []
    real = documents = 0
    for document in documents_in_window(packed, window):
        piece = document.piece
        documents += 1
        real += piece.length
        last = piece.begin + piece.length
        # The ids of structure around a document's segments are one or two: they go to the nearest.
        if not document.segments:
            parts.append(StripPart(begin=piece.begin, end=last, kind="structure", title=document.key, is_cut=True))
            continue
        begins = [piece.begin, *(segment.begin for segment in document.segments[1:])]
        for begin, end, part in zip(begins, [*begins[1:], last], document.segments, strict=True):
            kind = "text" if isinstance(part.segment, Text) else "image" if isinstance(part.segment, Image) else "video"
            parts.append(
                StripPart(
                    begin=begin,
                    end=end,
                    kind=kind,
                    is_cut=document.is_cut,
                    opens=begin == piece.begin,
                    title=f"{kind}, {end - begin:,} ids at {begin:,}: document {piece.document:,}, {document.key}",
                )  # fmt: skip
            )
    fill = f"{real / packed.seq_length:.1%}"
    return Strip(
        label=f"{window:,}", length=packed.seq_length, parts=parts,
        note=f"{fill} · {documents} document{'s' * (documents != 1)}",
    )  # fmt: skip


def _quantiles(lengths: np.ndarray) -> tuple[list[float], list[int]]:
    ordered = np.sort(lengths)[::-1]
    places = np.linspace(0, len(ordered) - 1, min(POINTS, len(ordered))).astype(int)
    return (100 * places / max(1, len(ordered) - 1)).tolist(), ordered[places].tolist()

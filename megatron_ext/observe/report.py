"""The HTML builder of all reports: one self-contained page of facts, curves, tables and pictures.

page = Report("Title", "What this shows.")
page.section("Training")
page.figure(curves({"text": (steps, losses)}, x_label="step", y_label="loss"), "What to see in it.")
page.write("report.html")
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from PIL import Image

from megatron_ext.files import replacing
from megatron_ext.observe.elements import Bar, Flow, Shown, Strip

COLORS = ("#3f7fc4", "#d9742b", "#2c9c83", "#8f63c2", "#b8860b", "#c45a84")  # readable on white and on near-black
INK = "#010203"  # stands for the page's text colour in figures; `Report.figure` replaces it

KINDS = ("text", "image", "video", "interleaved", "structure", "visual")
"""Names that always have the same colour; `report.html.jinja` says which."""

Points = tuple[Sequence[float], Sequence[float]]
"""x and y of a curve."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """Pictures side by side, and what is said of them."""

    pictures: Mapping[str, Image.Image | None]
    """Label -> picture; None leaves the place empty."""

    texts: Mapping[str, str] = field(default_factory=dict)
    """Label -> text under the pictures."""

    badge: str = ""
    """`seen in training`, `held out`, or nothing."""


class Report:
    """A page, filled from top to bottom."""

    def __init__(self, title: str, lead: str) -> None:
        """`lead` is the sentence under the title."""
        self._title = title
        self._lead = lead
        self._blocks: list[dict[str, Any]] = []

    def section(self, heading: str, text: str = "") -> None:
        """Begin a section, with a first paragraph if `text` is given."""
        self._blocks.append({"kind": "section", "heading": heading})
        if text:
            self.text(text)

    def text(self, text: str) -> None:
        """A paragraph."""
        self._blocks.append({"kind": "text", "text": text})

    def note(self, text: str) -> None:
        """A paragraph that must not be missed."""
        self._blocks.append({"kind": "note", "text": text})

    def code(self, text: str) -> None:
        """Lines to copy."""
        self._blocks.append({"kind": "code", "text": text})

    def facts(self, facts: Mapping[str, str]) -> None:
        """Figures at a glance: label -> value."""
        self._blocks.append({"kind": "facts", "facts": facts})

    def figure(self, figure: Figure, caption: str) -> None:
        """A matplotlib figure as inline SVG in the page's colours."""
        self._blocks.append({"kind": "figure", "svg": markupsafe.Markup(_svg(figure)), "caption": caption})

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; columns of numbers align right and get separators for thousands."""
        columns = range(len(header))
        numeric = {i for i in columns if rows and all(_is_number(row[i]) for row in rows)}
        shown = [[_cell(cell) for cell in row] for row in rows]
        self._blocks.append({"kind": "table", "header": header, "rows": shown, "numeric": numeric})

    def cards(self, cards: Sequence[Card]) -> None:
        """A grid of cards; pictures become inline PNG."""
        shown = [
            {
                "badge": card.badge,
                "texts": card.texts,
                "pictures": [
                    {"label": label, "source": _png(picture) if picture else ""}
                    for label, picture in card.pictures.items()
                ],
            }
            for card in cards
        ]
        self._blocks.append({"kind": "cards", "cards": shown})

    def bars(self, bars: Sequence[Bar]) -> None:
        """Bars of equal length, each divided into its parts, and a legend of the parts' names."""
        names = dict.fromkeys(name for bar in bars for name, _, _ in bar.parts)
        self._blocks.append({"kind": "bars", "bars": bars, "names": list(names)})

    def strips(self, strips: Sequence[Strip]) -> None:
        """Windows one under the other, and a legend."""
        kinds = dict.fromkeys(part.kind for strip in strips for part in strip.parts)
        self._blocks.append({"kind": "strips", "strips": strips, "names": list(kinds)})

    def flows(self, flows: Sequence[Flow]) -> None:
        """Documents one under the other; pictures become inline PNG."""
        shown = [
            {
                "flow": flow,
                "items": [
                    {"kind": type(item).__name__.lower(), "item": item}
                    | ({"source": _png(item.picture)} if isinstance(item, Shown) else {})
                    for item in flow.items
                ],
            }
            for flow in flows
        ]
        self._blocks.append({"kind": "flows", "flows": shown})

    def write(self, path: str | Path) -> Path:
        """Write the page; it needs no other file."""
        path = Path(path)
        source = resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
        html = environment.from_string(source).render(
            title=self._title, lead=self._lead, blocks=self._blocks, known=KINDS
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(html, encoding="utf-8")
        return path


def curves(
    series: Mapping[str, Points],
    *,
    x_label: str,
    y_label: str,
    marks: Mapping[float, str] | None = None,
    faint: Mapping[str, Points] | None = None,
    log_y: bool = False,
) -> Figure:
    """Curves over one x axis: `series` strong, `faint` (the same names) behind them, `marks` as vertical lines."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for color, (name, (x, y)) in zip(COLORS, series.items(), strict=False):
            if faint and name in faint:
                axes.plot(*faint[name], color=color, alpha=0.3, linewidth=0.8)
            axes.plot(x, y, color=color, linewidth=1.6, label=name)
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        _mark(axes, marks or {})
        axes.set(xlabel=x_label, ylabel=y_label)
        if len(series) > 1:
            axes.legend(frameon=False, loc="upper right")
    return figure


def histogram(
    series: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    y_label: str,
    marks: Mapping[float, str] | None = None,
    bins: int = 50,
) -> Figure:
    """Counts of values, the series on top of each other in bins of equal width; `marks` as vertical lines."""
    # The marks count, or bins of values that are all alike would be too narrow to see.
    places = [*(value for values in series.values() for value in values), *(marks or {})]
    options = {"bins": bins, "range": (min(places), max(places)), "stacked": True}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 2.6), layout="constrained")
        axes = figure.add_subplot()
        axes.hist(list(series.values()), **options, color=COLORS[: len(series)], label=list(series))
        _mark(axes, marks or {})
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _mark(axes: Axes, marks: Mapping[float, str]) -> None:
    for position, text in marks.items():
        axes.axvline(position, color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
        axes.annotate(text, (position, 1), (4, -4), xycoords=("data", "axes fraction"),
                      textcoords="offset points", va="top", fontsize=9)  # fmt: skip


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Mean of each value and the `span - 1` before it (of fewer at the start)."""
    smoothed, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - span] if index >= span else 0.0)
        smoothed.append(total / min(index + 1, span))
    return smoothed


_STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "axes.formatter.min_exponent": 4,  # on a logarithmic axis 0.7, not 7 x 10^-1
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",  # text stays text: the page's font, and a smaller file
    "svg.hashsalt": "report",  # the same figure gives the same bytes
}


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and value.endswith("%"))


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if isinstance(value, float) else str(value)

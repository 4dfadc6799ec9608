"""What the report's pages show of data: bars of shares, strips of windows, and documents as they are written.

Each is plain data that `report.html.jinja` lays out. Kinds (text, image, video, interleaved, structure, visual) have
a colour each, the same everywhere on a page.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A quantity in its parts."""

    label: str
    parts: Sequence[tuple[str, float, str]]
    """(name, amount, what the reader is told of it); the amounts of all of them make the whole bar."""

    @property
    def readable(self) -> float:
        """The amount of a part that is wide enough for words."""
        return 0.06 * sum(amount for _, amount, _ in self.parts)


@dataclass(frozen=True, kw_only=True)
class StripPart:
    """A stretch of a window."""

    begin: int
    end: int
    """One past its last position."""
    kind: str
    title: str
    """Shown where the reader points at it."""
    opens: bool = False
    """Whether a document begins here."""
    is_cut: bool = False
    """Whether only a part of its document is here."""


@dataclass(frozen=True, kw_only=True)
class Strip:
    """A window: what has no part is padding."""

    label: str
    length: int
    """Positions of the window."""
    parts: Sequence[StripPart]
    note: str = ""

    @property
    def edge(self) -> float:
        """Width of the line where a document begins, in positions: a hair of the whole."""
        return self.length / 500


@dataclass(frozen=True)
class Token:
    """An id of structure, as it is called, and how often it stands here in a row."""

    name: str
    title: str = ""


@dataclass(frozen=True)
class Words:
    """Text between ids of structure."""

    text: str


@dataclass(frozen=True)
class Shown:
    """A picture, or one frame of a clip, in its place."""

    picture: Image.Image
    caption: str
    is_codes: bool = False
    """Whether it shows codes as colours, to be enlarged without smoothing."""


@dataclass(frozen=True, kw_only=True)
class Flow:
    """A document from its first id to its last."""

    title: str
    kind: str
    facts: str
    items: Sequence[Token | Words | Shown] = field(default_factory=tuple)

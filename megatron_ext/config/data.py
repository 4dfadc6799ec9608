"""Section `data`: what is trained on, and how documents share a window."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One indexed dataset of a blend."""

    prefix: str
    """Path of the .bin/.idx pair without its suffix; s3://BUCKET/PATH on an object store."""

    weight: float = 1.0
    """Share of the windows, relative to the other datasets' weights."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, and how documents share a window."""

    train: tuple[DatasetConfig, ...] = ()
    """Datasets of the training blend: a list of {prefix, weight}."""

    valid: tuple[DatasetConfig, ...] = ()
    """Held-out datasets for evaluation; empty turns evaluation off."""

    attention_scope: Literal["document", "window"] = "document"
    """What a token may attend to: its own document, or everything before it in the window. The paper does not say which
    Emu3 used."""

    document_alignment: int = 1
    """Each document is padded at its end to a multiple of this; scope document wants a multiple of 2 x
    context_parallel_size."""

    packing_seed: int = 0
    """Draws which documents of a dataset are packed together, where it has more than one buffer of them."""

    cut_text_to_fill: bool = False
    """Whether texts are cut to fill what pictures leave of a window. Windows get fuller, but cut documents teach worse
    (Ding et al. 2024, arXiv 2404.10830); pictures and frames are never cut."""

    allow_change: bool = False
    """Whether a run may go on with other datasets than its checkpoint has read; other weights need no permission."""

    max_bad_fraction: float = 0.01
    """Largest share of a dataset's documents that may not fit, with a picture or frame longer than a window; they are
    skipped and named, more of them stop the run."""

    cache_dir: str | None = None
    """Folder of the packing index, and of what is copied from an object store; empty: beside the first dataset."""

"""Section `data`: what is trained on, and how documents share a window."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from megatron_ext.config.errors import InputError
from megatron_ext.config.section import Count, Name, Positive, Section, Seed, Share

LONGEST_PERIOD = 10_000
"""Windows of a blend's period: shares of windows are exact to 1/10,000, and exact when a shorter period fits them."""

OBJECT_STORE = "s3://"
"""What the prefix of a dataset on an object store begins with."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(Section):
    """One indexed dataset of a blend."""

    prefix: Name
    """Path of the .bin/.idx pair without its suffix; s3://BUCKET/PATH on an object store."""

    weight: Positive = 1.0
    """Share of the windows, relative to the other datasets' weights."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section, section="data"):
    """What is trained on, and how documents share a window."""

    train: tuple[DatasetConfig, ...] = ()
    """Datasets of the training blend: a list of {prefix, weight}."""

    valid: tuple[DatasetConfig, ...] = ()
    """Held-out datasets for evaluation; empty turns evaluation off."""

    attention_scope: Literal["document", "window"] = "document"
    """What a token may attend to: its own document, or everything before it in the window. The paper does not say which
    Emu3 used."""

    document_alignment: Count = 1
    """Each document is padded at its end to a multiple of this; scope document wants a multiple of 2 x
    context_parallel_size."""

    packing_seed: Seed = 0
    """Draws which documents of a dataset are packed together, where it has more than one buffer of them."""

    cut_text_to_fill: bool = False
    """Whether texts are cut to fill what pictures leave of a window. Windows get fuller, but cut documents teach worse
    (Ding et al. 2024, arXiv 2404.10830); pictures and frames are never cut."""

    allow_change: bool = False
    """Whether a run may go on with other datasets than its checkpoint has read; other weights need no permission."""

    max_bad_fraction: Share = 0.01
    """Largest share of a dataset's documents that may not fit, with a picture or frame longer than a window; they are
    skipped and named, more of them stop the run."""

    cache_dir: Name | None = None
    """Folder of the packing index, and of what is copied from an object store; empty: beside the first dataset."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, blend in (("train", self.train), ("valid", self.valid)):
            # str: 0.1 means one tenth, not its nearest double
            weights = [Fraction(str(dataset.weight)) for dataset in blend]
            for dataset, weight in zip(blend, weights, strict=True):
                if weight * LONGEST_PERIOD < sum(weights):
                    raise InputError(
                        f"data.{name}: weight {dataset.weight:g} of {dataset.prefix!r} is less than 1/{LONGEST_PERIOD} "
                        "of all: raise it or leave the dataset out"
                    )
        if self.cache_dir is None and self.train and self.train[0].prefix.startswith(OBJECT_STORE):
            raise InputError(
                f"data.cache_dir is empty and data.train begins with {self.train[0].prefix!r}, on an object store: "
                "name a local folder for the packing index"
            )

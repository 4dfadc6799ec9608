"""Make Megatron's .bin and .idx that others wrote a dataset: `python tools/adopt_dataset.py --prefix '[data/theirs]'`.

Every document is held against the vocabulary and the grammar of documents; what is none is named, and nothing is
written. Else vocabulary, sidecar and manifest appear beside the shard, whose own files are not touched. Killed and
started again it goes on where it was; of a shard that is a dataset already nothing is done.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from megatron_ext.config import InputError, load, run_program
from megatron_ext.config.section import Count, Name, Section
from megatron_ext.config.vocab import VocabConfig
from megatron_ext.data.adopt import Adoption, NotDocuments
from megatron_ext.data.indexed import DocumentDataset
from megatron_ext.data.report import dataset_report
from megatron_ext.observe.progress import progress
from megatron_ext.vocab import Vocabulary


@dataclass(frozen=True, kw_only=True)
class AdoptConfig(Section):
    """Make Megatron's .bin and .idx that others wrote datasets: check them, write what they lack beside them."""

    prefix: tuple[Name, ...]
    """List of paths without suffix."""

    vocab: VocabConfig = field(default_factory=VocabConfig)
    """Which ids mean what."""

    vision_tokenizer: Name | None = None
    """Folder of the vision tokenizer that made the visual ids, or its identity as a manifest has it; empty: there are
    none."""

    workers: Count = 1
    """Processes that check documents."""


def adopt(config: AdoptConfig) -> None:
    """Adopt each shard and print its report.

    Raises:
        InputError: a shard that is none, or documents that are none; the lines before it name the first.
    """
    vocabulary = Vocabulary.load(config.vocab)
    tokenizer = _identity(config.vision_tokenizer, vocabulary)
    shards = [Adoption.of(prefix, vocabulary, tokenizer) for prefix in config.prefix]
    for shard in shards:
        if shard.finished() is not None:
            print(f"{shard.prefix} is a dataset already: reused")
        else:
            with progress(f"adopt {shard.prefix}", shard.num_ids, "ids", Console()) as advance:
                try:
                    shard.do(config.workers, advance)
                except NotDocuments as error:
                    print("\n".join(f"  {offence}" for offence in error.first), flush=True)
                    raise
        print("\n".join(dataset_report(DocumentDataset(shard.prefix, vocabulary))), flush=True)


def _identity(given: str | None, vocabulary: Vocabulary) -> str | None:
    """Of the vision tokenizer.

    Raises:
        InputError: neither a folder nor an identity, or another codebook than the vocabulary's.
    """
    if given is None or re.fullmatch(r"[0-9a-f]{16}", given):
        return given
    if not Path(given).is_dir():
        raise InputError(f"vision_tokenizer is {given!r}: give its folder, or its identity, 16 hexadecimal digits")
    from megatron_ext.vision import load_vision_tokenizer

    model = load_vision_tokenizer(given)
    wanted = vocabulary.layout.codebook_size
    if model.config.codebook_size != wanted:
        raise InputError(
            f"vision_tokenizer {given} has {model.config.codebook_size} codes, vocabulary {vocabulary.layout.name} "
            f"{wanted}: give the one that made the ids"
        )
    return model.identity


def main(argv: list[str]) -> None:
    """Adopt what `argv` names."""
    adopt(load(AdoptConfig, argv, prog="adopt_dataset.py"))


def cli() -> None:
    """Console script emu3-adopt-dataset."""
    run_program(main)


if __name__ == "__main__":
    cli()

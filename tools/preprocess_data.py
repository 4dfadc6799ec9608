"""Tokenized media, captions and text files into indexed datasets: `python tools/preprocess_data.py --config FILE`.

Writes OUTPUT_PREFIX_train and, with a valid_fraction, OUTPUT_PREFIX_valid. The same inputs and options give the same
bytes. Nothing appears under the final names before everything is complete. Samples that cannot be used are skipped,
counted and named; too many of them stop the program.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from megatron_ext.config import BadSamples, InputError, load, run_program
from megatron_ext.config.vocab import VocabConfig
from megatron_ext.data.indexed import DocumentDataset, DocumentWriter
from megatron_ext.data.report import dataset_report
from megatron_ext.data.sources import MediaSample, TokenizedFolder
from megatron_ext.media.texts import NOT_UNICODE, BadText, TextUnit, find_text_files, is_unicode, read_texts
from megatron_ext.observe.progress import progress
from megatron_ext.vocab import Segment, Text, Vocabulary

_TEXTS_AT_ONCE = 1024  # the text tokenizers encode a batch in parallel

Document = tuple[str, list[Segment]]
"""Source key and segments."""


@dataclass(kw_only=True)
class Inputs:
    """What was read so far."""

    bad: BadSamples
    samples: int = 0
    """Pictures, clips and texts, the bad ones included."""
    empty: Counter[str] = field(default_factory=Counter)
    """Captions and texts without a character: passed over."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Write indexed datasets of documents from tokenized media, captions and text files."""

    vocab: VocabConfig = field(default_factory=VocabConfig)
    """Which ids mean what."""

    vision: tuple[str, ...] = ()
    """List of folders of tokenized pictures and clips, as tokenize_vision.py writes them."""

    text: tuple[str, ...] = ()
    """List of glob patterns of text files (`**` for folders): UTF-8, or .jsonl and .parquet with a document per row in
    field text; each but .parquet also as .gz or .zst."""

    output_prefix: str
    """Path of the datasets without `_train`, `_valid` and suffix."""

    text_unit: TextUnit = "paragraph"
    """What of a plain text file is one document: a line, a paragraph (up to an empty line), or the file."""

    caption_position: Literal["before", "after", "both", "random"] = "random"
    """A caption stands before its picture (to draw it), after it (to describe it), both (two documents), or random."""

    caption_after_probability: float = 0.5
    """Probability of `after` for caption_position random; drawn per caption from seed and source key."""

    missing_caption: Literal["skip", "keep"] = "skip"
    """What a picture or clip without a caption is: a bad sample, or a document of its own."""

    max_bad_fraction: float = 0.01
    """Largest share of pictures, clips and texts that may be unusable (no caption, not UTF-8, no string in a row of
    .jsonl or .parquet); more of them stop."""

    valid_fraction: float = 0.0
    """Share of the source keys held out; all documents of one picture fall on one side, whatever the seed."""

    seed: int = 1234
    """Seed of caption_position random."""

    def __post_init__(self) -> None:
        if not 0 <= self.valid_fraction < 1:
            raise InputError(f"valid_fraction is {self.valid_fraction}: give a share of at least 0 and below 1")
        if not 0 <= self.caption_after_probability <= 1:
            raise InputError(f"caption_after_probability is {self.caption_after_probability}: give a share in 0..1")
        if not self.vision and not self.text:
            raise InputError("vision and text are both empty: give at least one folder or pattern")


def preprocess(config: PreprocessConfig) -> None:
    """Write the datasets and print their report.

    Raises:
        InputError: unreadable or contradicting inputs, or a dataset that would be empty.
    """
    vocabulary = Vocabulary.load(config.vocab)
    folders = [TokenizedFolder.open(path) for path in config.vision]
    text_files = find_text_files(config.text)
    vision_tokenizer = _common_tokenizer(folders, vocabulary)
    splits = ("train", "valid") if config.valid_fraction else ("train",)
    _refuse_stale_valid(config)
    inputs = Inputs(bad=BadSamples(config.max_bad_fraction))
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(DocumentWriter(f"{config.output_prefix}_{split}", vocabulary, vision_tokenizer))
            for split in splits
        }
        for key, segments in itertools.chain(
            _media_documents(folders, config, vocabulary, inputs),
            _text_documents(text_files, config, vocabulary, inputs),
        ):
            held_out = draw("valid", key) < config.valid_fraction
            writers["valid" if held_out else "train"].add(segments, key)
        inputs.bad.check(inputs.samples)
        total = sum(len(writer) for writer in writers.values())
        for writer in writers.values():
            if total and not len(writer):
                raise InputError(
                    f"{writer.prefix} would be empty: valid_fraction {config.valid_fraction} leaves it none of the "
                    f"{total} documents"
                )
        for writer in writers.values():
            writer.commit()
    for split in splits:
        print("\n".join(dataset_report(DocumentDataset(f"{config.output_prefix}_{split}", vocabulary))), flush=True)
    for reason, count in (+inputs.empty).items():
        print(f"left out: {count:,} {reason}")
    for line in inputs.bad.lines():
        print(line)


def draw(*parts: int | str) -> float:
    """A number in [0, 1) that `parts` determine."""
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _common_tokenizer(folders: list[TokenizedFolder], vocabulary: Vocabulary) -> str | None:
    """The vision tokenizer of all folders; refuses two, and one whose codebook is not the vocabulary's."""
    layout = vocabulary.layout
    for folder in folders:
        if folder.codebook_size != layout.codebook_size:
            raise InputError(
                f"{folder.path} was tokenized with a codebook of {folder.codebook_size}, vocabulary {layout.name} has "
                f"{layout.codebook_size}: set vocab.codebook_size, or tokenize with the vocabulary's vision tokenizer"
            )
        if folder.vision_tokenizer != folders[0].vision_tokenizer:
            raise InputError(
                f"{folders[0].path} was made by vision tokenizer {folders[0].vision_tokenizer}, {folder.path} by "
                f"{folder.vision_tokenizer}: tokenize all media of a dataset with one"
            )
    return folders[0].vision_tokenizer if folders else None


def _refuse_stale_valid(config: PreprocessConfig) -> None:
    """Another run's held-out documents may be among this run's training documents."""
    stale = Path(f"{config.output_prefix}_valid.idx")
    if not config.valid_fraction and stale.exists():
        raise InputError(f"{stale} is left from a run with another valid_fraction: remove {stale.stem}.* first")


def _media_documents(
    folders: list[TokenizedFolder], config: PreprocessConfig, vocabulary: Vocabulary, inputs: Inputs
) -> Iterator[Document]:
    for folder in folders:
        with progress(f"vision {folder.path}", folder.num_samples, "samples", Console()) as advance:
            for sample in folder.samples():
                yield from _documents_of(sample, config, vocabulary, inputs)
                advance(1)


def _documents_of(
    sample: MediaSample, config: PreprocessConfig, vocabulary: Vocabulary, inputs: Inputs
) -> Iterator[Document]:
    """A document for each caption (two for caption_position both)."""
    inputs.samples += 1
    captions = [caption.strip() for caption in sample.captions]
    inputs.empty["empty captions"] += captions.count("")
    captions = [caption for caption in captions if caption]
    if not all(map(is_unicode, captions)):
        inputs.bad.add(sample.key, f"a caption is {NOT_UNICODE}")
        return
    if not captions and config.missing_caption == "keep":
        yield sample.key, [sample.media]
    elif not captions:
        inputs.bad.add(sample.key, "it has no caption")
    for number, caption in enumerate(_encoded(captions, vocabulary)):
        position = config.caption_position
        if position == "random":
            after = draw("caption", config.seed, sample.key, number) < config.caption_after_probability
            position = "after" if after else "before"
        if position in ("before", "both"):
            yield sample.key, [caption, sample.media]
        if position in ("after", "both"):
            yield sample.key, [sample.media, caption]


def _text_documents(
    files: list[Path], config: PreprocessConfig, vocabulary: Vocabulary, inputs: Inputs
) -> Iterator[Document]:
    if not files:
        return
    size = sum(path.stat().st_size for path in files)
    with progress(f"text, {len(files)} files", size, "bytes", Console()) as advance:
        texts = (item for path in files for item in read_texts(path, config.text_unit, advance))
        while batch := list(itertools.islice(texts, _TEXTS_AT_ONCE)):
            inputs.samples += len(batch)
            for bad in (item for item in batch if isinstance(item, BadText)):
                inputs.bad.add(bad.place, bad.reason)
            good = [item for item in batch if not isinstance(item, BadText)]
            filled = [(key, text) for key, text in good if text.strip()]
            inputs.empty["empty texts"] += len(good) - len(filled)
            for (key, _), text in zip(filled, _encoded([text for _, text in filled], vocabulary), strict=True):
                yield key, [text]


def _encoded(texts: list[str], vocabulary: Vocabulary) -> list[Text]:
    return [Text(np.asarray(ids)) for ids in vocabulary.text.encode_batch(texts)]


def main(argv: list[str]) -> None:
    """Write the datasets that `argv` describes."""
    preprocess(load(PreprocessConfig, argv, prog="preprocess_data.py"))


def cli() -> None:
    """Console script emu3-preprocess-data."""
    run_program(main)


if __name__ == "__main__":
    cli()

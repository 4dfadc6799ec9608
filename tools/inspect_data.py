"""What is in an indexed dataset: `python tools/inspect_data.py --prefix PREFIX`.

Prints counts and lengths; with --seq_length how it packs; with --document N one document; with --validate true whether
every document is one and every file is what the manifest says.
"""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_ext.config import InputError, load, run_program
from megatron_ext.data.indexed import KINDS, DocumentDataset
from megatron_ext.data.report import dataset_report, length_histogram, packing_report
from megatron_ext.observe.progress import progress
from megatron_ext.vocab import Grammar, Image, Segment, Text, Vocabulary, decode_document

_MOST_VIOLATIONS = 20


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Describe an indexed dataset."""

    prefix: str
    """Path of the dataset without suffix."""

    seq_length: int | None = None
    """Pack into windows of this many ids and report their fill, and the documents that do not fit."""

    document_alignment: int = 1
    """Alignment for that packing."""

    document: int | None = None
    """Number of a document to show, from 0, instead of the report."""

    validate: bool = False
    """Check every document with the grammar, and the files with the manifest."""


def show_document(dataset: DocumentDataset, number: int) -> list[str]:
    """Key, kind, spans and segments of a document.

    Raises:
        InputError: no such document.
    """
    if not 0 <= number < len(dataset):
        raise InputError(f"document is {number}: {dataset.prefix} has documents 0..{len(dataset) - 1}")
    ids = dataset.ids(number)
    sidecar = dataset.sidecar
    spans = " ".join(f"{start}..{end - 1}" for start, end in sidecar.spans.of(number)) or "none"
    return [
        f"document {number} of {dataset.prefix}: {KINDS[sidecar.kinds[number]]}, {len(ids):,} ids",
        f"  key: {sidecar.key(number)}",
        f"  unbreakable: {spans}",
        *(f"  {_describe(segment, dataset.vocabulary)}" for segment in decode_document(ids, dataset.vocabulary)),
    ]


def _describe(segment: Segment, vocabulary: Vocabulary) -> str:
    if isinstance(segment, Text):
        return f"text   {len(segment.ids):,} ids: {vocabulary.text.decode(segment.ids)!r}"
    if isinstance(segment, Image):
        rows, columns = segment.codes_HW.shape
        return f"image  {rows} x {columns} codes, {segment.codes_HW.min()}..{segment.codes_HW.max()}"
    frames, rows, columns = segment.codes_THW.shape
    return (
        f"video  {frames} frames of {rows} x {columns} codes, {segment.frame_rate_mhz / 1000:g} frames/s, "
        f"{segment.duration_ms / 1000:g} s"
    )


def validate(dataset: DocumentDataset) -> None:
    """Check files and documents.

    Raises:
        InputError: a document that is none (the lines before it name the first of them, position and reason), or ids
            that are not the manifest's. The sidecar may be another file: rebuilt, it has other keys.
    """
    intact_files = dataset.check_files()
    for suffix, intact in intact_files.items():
        print(f"  {suffix:<11} {'as the manifest says' if intact else 'NOT what the manifest says'}")
    grammar = Grammar(dataset.vocabulary)
    wrong = 0
    with progress("validate", len(dataset), "documents", Console()) as advance:
        for number in range(len(dataset)):
            if violation := grammar.validate(dataset.ids(number)):
                wrong += 1
                if wrong <= _MOST_VIOLATIONS:
                    key = dataset.sidecar.key(number)
                    print(f"  document {number} ({key}) at position {violation.position}: {violation.reason}")
            advance(1)
    if wrong:
        raise InputError(f"{dataset.prefix}: {wrong:,} of {len(dataset):,} documents are invalid: preprocess again")
    print(f"  all {len(dataset):,} documents are valid")
    for suffix in (".bin", ".idx"):
        if not intact_files[suffix]:
            raise InputError(f"{dataset.prefix}{suffix} is not what its manifest says: copy it again, or preprocess")


def main(argv: list[str]) -> None:
    """Print what `argv` asks for."""
    config = load(InspectConfig, argv, prog="inspect_data.py")
    dataset = DocumentDataset.open(Path(config.prefix))
    if config.document is not None:
        print("\n".join(show_document(dataset, config.document)))
        return
    print("\n".join(dataset_report(dataset) + length_histogram(dataset.lengths)))
    print(f"  vocabulary {dataset.manifest.vocabulary}\n  vision tokenizer {dataset.manifest.vision_tokenizer}")
    if config.seq_length is not None:
        print("\n".join(packing_report(dataset, config.seq_length, config.document_alignment)))
    if config.validate:
        validate(dataset)


def cli() -> None:
    """Console script emu3-inspect-data."""
    run_program(main)


if __name__ == "__main__":
    cli()

"""Train a SentencePiece text tokenizer: `python -m tokenizer_train.text.train --config FILE`.

The corpus is read once, as a stream; the same texts and options give the same model, byte for byte, on any number of
cores and however the texts are spread over files.
"""

import hashlib
import io
import json
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import sentencepiece
from rich.console import Console

from megatron_ext.config import BadSamples, InputError, load, run_program
from megatron_ext.config.section import Name, Section, Seed, Share, below, least, most
from megatron_ext.files import check_file, replacing, suffix_of, writing
from megatron_ext.vocab import QwenTokenizer, SentencePieceTokenizer, VocabLayout, Vocabulary
from megatron_ext.vocab.document import META_CHARACTERS
from megatron_ext.vocab.text import SPACE_MARK
from tokenizer_train.text.corpus import Corpus, CorpusFiles, sample_corpus
from tokenizer_train.text.measure import as_records, measure, table

# What a vocabulary demands of its text tokenizer, whether the corpus has it or not: a prose of Chinese has no space.
_REQUIRED = META_CHARACTERS + SPACE_MARK

# <unk>, 256 bytes, what is required, and one character of the corpus.
_SMALLEST_VOCABULARY = 257 + len(_REQUIRED) + 1
_LARGEST_VOCABULARY = 1 << 24

# SentencePiece leaves out every line with this character, its own mark of what it does not know.
_UNKNOWN_MARK = "\u2585"

# A corpus of nothing else has no character for SentencePiece to train on.
_UNTRAINABLE = frozenset(_REQUIRED + _UNKNOWN_MARK + " \t\0")

# Fixed, not the machine's: unigram training adds up its threads' partial sums, so their number shows in the model.
_NUM_THREADS = 16

# The suffix array of unigram training counts characters in 32 bits.
Sample = Annotated[int, least(1), most(2_000_000_000)]


@dataclass(frozen=True, kw_only=True)
class TextTokenizerTrainConfig(Section):
    """Train a lossless SentencePiece text tokenizer: bytes as fallback, spaces kept, digits and `*` single tokens."""

    input: tuple[Name, ...] = ()
    """List of glob patterns (`**` for folders) of UTF-8 text files, a document per line, and of .jsonl (.ndjson, .json)
    and .parquet, a document per row; each but .parquet also as .gz or .zst."""

    captions: tuple[Name, ...] = ()
    """List of folders in the layout of img2dataset's "files" output or of tars, WebDataset tars and manifests, or glob
    patterns of these; the captions of their pictures and clips are read."""

    text_field: Name = "text"
    """Key in JSON lines, and column of Parquet files, that holds the text."""

    output: Name
    """Model file to write; a report is written beside it, with .json in place of its suffix."""

    vocab_size: Annotated[int, least(_SMALLEST_VOCABULARY), most(_LARGEST_VOCABULARY)] = 32000
    """Pieces, the 256 bytes and <unk> included."""

    model_type: Literal["bpe", "unigram"] = "bpe"
    """Algorithm; on large corpora bpe trains about ten times faster."""

    character_coverage: Annotated[float, least(0.98), most(1)] = 0.9995
    """Share of the corpus' characters, 0.98..1, that get a piece of their own; the rest is written in bytes."""

    sample_bytes: Sample = 200_000_000
    """UTF-8 bytes to train on at most; of a larger corpus that many are drawn line by line. See docs/tokenizer.md for
    the memory and the time they take."""

    held_out_fraction: Annotated[Share, below(1)] = 0.01
    """Share of the documents that are not trained on but measured, chosen by a hash of their text; 0 measures none."""

    held_out_bytes: Sample = 20_000_000
    """UTF-8 bytes of held-out lines measured at most; of more, that many are drawn."""

    seed: Seed = 1234
    """Seed of the training sample; what is held out does not depend on it."""

    max_bad_fraction: Share = 0.01
    """Largest share of documents that may not be UTF-8, JSON or strings; they are skipped, more of them stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.input and not self.captions:
            raise InputError("input and captions are both empty: give at least one pattern")
        if suffix_of(self.output) == "json":
            raise InputError(f"output {self.output!r} would be overwritten by its report: name it .model")


def train_model(lines: tuple[str, ...], config: TextTokenizerTrainConfig) -> bytes:
    """Content of the model file.

    Raises:
        InputError: vocab_size does not suit the corpus, and the message says which size does; SentencePiece refuses
            the corpus.
    """
    sentences = [part for line in lines for part in line.split(_UNKNOWN_MARK) if part]
    if all(_UNTRAINABLE.issuperset(sentence) for sentence in sentences):
        raise InputError("input: its documents hold digits, spaces and control characters alone: give text to train on")
    model = io.BytesIO()
    try:
        with _interruptible():
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                vocab_size=config.vocab_size,
                model_type=config.model_type,
                character_coverage=config.character_coverage,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                split_digits=True,
                byte_fallback=True,
                required_chars=_REQUIRED,
                # No control pieces: a document's structure is the layout's special tokens, never the text tokenizer's.
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                # Longer lines would be left out without a word; below 10 is refused.
                max_sentence_length=max(10, 1 + max(len(sentence.encode()) for sentence in sentences)),
                shuffle_input_sentence=False,
                num_threads=_NUM_THREADS,
                minloglevel=2,
            )
    except RuntimeError as error:
        raise _explained(error, config) from error
    return model.getvalue()


def main(argv: list[str]) -> None:
    """Read, train, check as `Vocabulary.load` will, measure, write the model and its report."""
    config = load(TextTokenizerTrainConfig, argv, prog="python -m tokenizer_train.text.train")
    output = Path(config.output)
    for written in (output, output.with_suffix(".json")):
        check_file(written, "output")
    files = CorpusFiles.find(config.input, config.captions)
    # All that could refuse the result is asked before the work, and the model is written as soon as there is one.
    qwen = QwenTokenizer() if config.held_out_fraction else None
    corpus = _read(files, config)
    print(f"training {config.model_type}, {config.vocab_size:,} pieces ...", flush=True)
    started = time.monotonic()
    model = train_model(corpus.lines, config)
    seconds = time.monotonic() - started
    print(f"trained in {seconds:.2f} s", flush=True)

    tokenizer = SentencePieceTokenizer(model)
    Vocabulary(VocabLayout.custom(text_size=tokenizer.size, codebook_size=1), tokenizer)
    _write(output, model)
    rows = measure({"this model": tokenizer, "Qwen (Emu3's)": qwen}, corpus.held_out) if qwen else []
    for line in table(rows) if rows else ["held out: no document, so nothing is measured"]:
        print(line, flush=True)
    report = _report(config, corpus, files, tokenizer) | {
        "train_seconds": round(seconds, 2),
        "held_out": as_records(rows),
    }
    _write(output.with_suffix(".json"), (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    print(f"wrote {output}: {tokenizer.size:,} pieces", flush=True)


def cli() -> None:
    """Console script."""
    run_program(main)


def _read(files: CorpusFiles, config: TextTokenizerTrainConfig) -> Corpus:
    """The corpus' samples; a line for each bad document, and one for what was read."""
    bad = BadSamples(config.max_bad_fraction)
    corpus = sample_corpus(
        files.documents(config.text_field, bad, Console()),
        seed=config.seed,
        held_out_fraction=config.held_out_fraction,
        sample_bytes=config.sample_bytes,
        held_out_bytes=config.held_out_bytes,
    )
    bad.check(corpus.documents + len(bad.samples))
    if not corpus.lines:
        raise InputError(f"input: the {corpus.documents:,} documents hold no text to train on")
    for line in bad.lines():
        print(line, flush=True)
    part = f", drawn from more (sample_bytes {config.sample_bytes:,})" if corpus.is_sampled else ""
    print(
        f"read {corpus.documents:,} documents, {corpus.characters:,} characters: "
        f"training on {len(corpus.lines):,} lines{part}, {len(corpus.held_out):,} lines held out",
        flush=True,
    )
    return corpus


def _report(
    config: TextTokenizerTrainConfig, corpus: Corpus, files: CorpusFiles, tokenizer: SentencePieceTokenizer
) -> dict[str, object]:
    digest = hashlib.sha256()
    for line in corpus.lines:
        digest.update(line.encode() + b"\n")
    return {
        "format_version": 2,
        "identity": tokenizer.identity,
        "model_type": config.model_type,
        "pieces": tokenizer.size,
        "files": len(files.texts) + len(files.media),
        "documents": corpus.documents,
        "characters": corpus.characters,
        "lines": len(corpus.lines),
        "lines_sha256": digest.hexdigest(),
        "is_sampled": corpus.is_sampled,
    }


def _explained(error: RuntimeError, config: TextTokenizerTrainConfig) -> InputError:
    """SentencePiece's two complaints about vocab_size in our words; another one in its own."""
    size = config.vocab_size
    if too_large := re.search(r"Please set it to a value <= (\d+)", str(error)):
        return InputError(f"vocab_size {size} is too large for this corpus: use at most {too_large[1]}, or add text")
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return InputError(
            f"vocab_size {size} is too small: bytes and the corpus' characters alone are {too_small[1]} pieces; "
            f"use more, or lower character_coverage {config.character_coverage}"
        )
    return InputError(f"SentencePiece cannot train {size:,} pieces on this corpus: {error}")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the process at once: the native trainer would only be asked when it is done; no file is open."""
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _write(path: Path, content: bytes) -> None:
    with writing(path, "output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)


if __name__ == "__main__":
    run_program(main)

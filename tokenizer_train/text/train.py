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
from megatron_ext.files import check_file, replacing, writing
from megatron_ext.vocab import QwenTokenizer, SentencePieceTokenizer, VocabLayout, Vocabulary
from megatron_ext.vocab.document import META_CHARACTERS
from tokenizer_train.text.corpus import Corpus, CorpusFiles, sample_corpus
from tokenizer_train.text.measure import as_records, measure, table

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
    """List of glob patterns of folders in the layout of img2dataset's "files" output and of WebDataset tars; the
    captions of their pictures and clips are read."""

    text_field: Name = "text"
    """Key in JSON lines, and column of Parquet files, that holds the text."""

    output: Name
    """Model file to write; a report is written beside it, with .json in place of its suffix."""

    vocab_size: Annotated[int, least(1), most(2**31 - 1)] = 32000
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
        if Path(self.output).suffix == ".json":
            raise InputError(f"output {self.output!r} would be overwritten by its report: name it .model")


def train_model(lines: tuple[str, ...], config: TextTokenizerTrainConfig) -> bytes:
    """Content of the model file.

    Raises:
        InputError: vocab_size does not suit the corpus; the message says which size does.
    """
    model = io.BytesIO()
    try:
        with _interruptible():
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                vocab_size=config.vocab_size,
                model_type=config.model_type,
                character_coverage=config.character_coverage,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                split_digits=True,
                byte_fallback=True,
                required_chars=META_CHARACTERS,
                # No control pieces: a document's structure is the layout's special tokens, never the text tokenizer's.
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                # Longer lines would be left out without a word.
                max_sentence_length=max(len(line.encode()) for line in lines) + 1,
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
    corpus = _read(files, config)
    print(f"training {config.model_type}, {config.vocab_size:,} pieces ...", flush=True)
    started = time.monotonic()
    model = train_model(corpus.lines, config)
    seconds = time.monotonic() - started
    print(f"trained in {seconds:.2f} s", flush=True)

    tokenizer = SentencePieceTokenizer(model)
    Vocabulary(VocabLayout.custom(text_size=tokenizer.size, codebook_size=1), tokenizer)
    rows = measure({"this model": tokenizer, "Qwen (Emu3's)": QwenTokenizer()}, corpus.held_out)
    for line in table(rows) if rows else ["held out: no document, so nothing is measured"]:
        print(line, flush=True)
    report = _report(config, corpus, files, tokenizer) | {
        "train_seconds": round(seconds, 2),
        "held_out": as_records(rows),
    }
    _write(output, model)
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


def _explained(error: RuntimeError, config: TextTokenizerTrainConfig) -> Exception:
    """SentencePiece's two complaints about vocab_size in our words; any other error as it is."""
    size = config.vocab_size
    if too_large := re.search(r"Please set it to a value <= (\d+)", str(error)):
        return InputError(f"vocab_size {size} is too large for this corpus: use at most {too_large[1]}, or add text")
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return InputError(
            f"vocab_size {size} is too small: bytes and the corpus' characters alone are {too_small[1]} pieces; "
            f"use more, or lower character_coverage {config.character_coverage}"
        )
    return error


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

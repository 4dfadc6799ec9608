"""Train a SentencePiece text tokenizer: `python -m tokenizer_train.text.train --config FILE`.

The same files and options give the same model, byte for byte, on any number of cores.
"""

import glob
import hashlib
import io
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece

from megatron_ext.config import BadSamples, InputError, load, run_program, writing
from megatron_ext.media import MediaError, json_captions
from megatron_ext.vocab import SentencePieceTokenizer, VocabLayout, Vocabulary
from megatron_ext.vocab.document import META_CHARACTERS

# Fixed, not the machine's: unigram training adds up its threads' partial sums, so their number shows in the model.
_NUM_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class TextTokenizerTrainConfig:
    """Train a lossless SentencePiece text tokenizer: bytes as fallback, spaces kept, digits and `*` single tokens."""

    input: tuple[str, ...]
    """List of glob patterns (`**` for folders): UTF-8 text files, and img2dataset's .json (its captions are read)."""

    output: str
    """Model file to write; a report is written beside it, with .json in place of its suffix."""

    vocab_size: int = 32000
    """Pieces, the 256 bytes and <unk> included."""

    model_type: Literal["bpe", "unigram"] = "bpe"
    """Algorithm; on large corpora bpe trains about ten times faster."""

    character_coverage: float = 0.9995
    """Share of the corpus' characters, 0.98..1, that get a piece of their own; the rest is written in bytes."""

    max_bad_fraction: float = 0.01
    """Largest share of lines and caption files that may not be UTF-8 or JSON; they are skipped, more of them stop."""

    def __post_init__(self) -> None:
        if not 0.98 <= self.character_coverage <= 1:
            raise InputError(f"character_coverage {self.character_coverage} is outside SentencePiece's 0.98..1")
        if Path(self.output).suffix == ".json":
            raise InputError(f"output {self.output!r} would be overwritten by its report: name it .model")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What the input patterns found."""

    files: tuple[Path, ...]
    """Every matching file once, sorted."""

    lines: tuple[str, ...]
    """Their text, without empty lines."""

    @property
    def characters(self) -> int:
        """Characters in all lines."""
        return sum(map(len, self.lines))


def read_corpus(patterns: tuple[str, ...], bad: BadSamples) -> Corpus:
    """All lines of the files that `patterns` match; lines that are not UTF-8, and unreadable captions, go to `bad`.

    Raises:
        InputError: a pattern matches nothing, a file cannot be read, too much is bad, or there is no text at all.
    """
    files = set()
    for pattern in patterns:
        matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
        if not any(match.is_file() for match in matches):
            raise InputError(f"input {pattern!r} matches no file: check the path, relative to {Path.cwd()}")
        files.update(match for match in matches if match.is_file())
    ordered = tuple(sorted(files))
    lines = tuple(line for path in ordered for line in _lines(path, bad) if line.strip())
    bad.check(len(lines) + len(bad.reasons))
    if not lines:
        raise InputError(f"input: the {len(ordered)} matching files hold no text")
    return Corpus(files=ordered, lines=lines)


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
    """Read, train, check as `Vocabulary.load` will, write the model and its report."""
    config = load(TextTokenizerTrainConfig, argv, prog="python -m tokenizer_train.text.train")
    output = Path(config.output)
    bad = BadSamples(config.max_bad_fraction)
    corpus = read_corpus(config.input, bad)
    for line in bad.lines():
        print(line, flush=True)
    print(f"read {len(corpus.files)} files: {len(corpus.lines):,} lines, {corpus.characters:,} characters", flush=True)
    print(f"training {config.model_type}, {config.vocab_size:,} pieces ...", flush=True)
    started = time.monotonic()
    model = train_model(corpus.lines, config)
    print(f"trained in {time.monotonic() - started:.2f} s", flush=True)

    tokenizer = SentencePieceTokenizer(model)
    Vocabulary(VocabLayout.custom(text_size=tokenizer.size, codebook_size=1), tokenizer)
    report = _report(config, corpus, tokenizer)
    _write(output, model)
    _write(output.with_suffix(".json"), (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    rate = report["characters_per_token"]
    print(f"wrote {output}: {tokenizer.size:,} pieces, {rate} characters per token on this corpus", flush=True)


def cli() -> None:
    """Console script."""
    run_program(main)


def _report(config: TextTokenizerTrainConfig, corpus: Corpus, tokenizer: SentencePieceTokenizer) -> dict[str, object]:
    tokens = sum(map(len, tokenizer.encode_batch(corpus.lines)))
    return {
        "format_version": 1,
        "identity": tokenizer.identity,
        "model_type": config.model_type,
        "pieces": tokenizer.size,
        "files": len(corpus.files),
        "lines": len(corpus.lines),
        "characters": corpus.characters,
        "tokens": tokens,
        "characters_per_token": round(corpus.characters / tokens, 3),
        "corpus_sha256": hashlib.sha256("\n".join(corpus.lines).encode()).hexdigest(),
    }


def _lines(path: Path, bad: BadSamples) -> Iterator[str]:
    """A file's lines; of JSON those of the captions."""
    try:
        content = path.read_bytes()
        if path.suffix == ".json":
            yield from "\n".join(json_captions(content)).splitlines()
            return
    except OSError as error:
        raise InputError(f"input: cannot read {path}: {error.strerror}") from None
    except MediaError as error:
        bad.add(str(path), str(error))
        return
    # A broken byte becomes a lone surrogate, which cannot be encoded again: it spoils its line, not the file.
    for number, line in enumerate(content.decode("utf-8", errors="surrogateescape").splitlines(), 1):
        try:
            line.encode()
            yield line
        except UnicodeEncodeError:
            bad.add(f"{path}:{number}", "not UTF-8")


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
    temporary = path.with_name(path.name + ".tmp")
    with writing(path, "output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    run_program(main)

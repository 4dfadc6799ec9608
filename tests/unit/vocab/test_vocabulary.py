"""Loading, refusing, saving and naming vocabularies."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megatron_ext.config import InputError
from megatron_ext.config.vocab import VocabConfig
from megatron_ext.vocab import Image, SentencePieceTokenizer, Text, VocabLayout, Vocabulary, encode_document


@pytest.fixture
def model_file(tmp_path: Path, sentencepiece_model: bytes) -> Path:
    path = tmp_path / "text.model"
    path.write_bytes(sentencepiece_model)
    return path


def test_load(emu3: Vocabulary, emu3_5: Vocabulary, custom: Vocabulary, model_file: Path) -> None:
    assert Vocabulary.load(VocabConfig()).identity == emu3.identity
    assert Vocabulary.load(VocabConfig(layout="emu3_5")).identity == emu3_5.identity
    config = VocabConfig(layout="custom", text_tokenizer=str(model_file), codebook_size=50)
    assert Vocabulary.load(config).identity == custom.identity


def test_load_refuses_a_missing_model() -> None:
    with pytest.raises(InputError, match="cannot read text tokenizer absent"):
        Vocabulary.load(VocabConfig(layout="custom", text_tokenizer="absent", codebook_size=4))


def _tokenizer(**options: object) -> SentencePieceTokenizer:
    """A lossless model whose treatment of digits is in question."""
    model = io.BytesIO()
    lines = ["1024", "1024 3689 a b"] * 20
    defaults = dict(
        vocab_size=320, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False, split_digits=True, model_type="bpe", hard_vocab_limit=False, minloglevel=3,
    )  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **(defaults | options))
    return SentencePieceTokenizer(model.getvalue())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"split_digits": False}, r"has token \d+ for '[0-9*]+'"),
        ({"split_digits": False, "model_type": "unigram"}, r"has token \d+ for '[0-9*]+'"),
        ({"user_defined_symbols": ["6*4"]}, r"has token \d+ for '6\*4'"),
    ],
)
def test_merged_digits_are_refused(options: dict, message: str) -> None:
    tokenizer = _tokenizer(**options)
    with pytest.raises(InputError, match=message):
        Vocabulary(VocabLayout.custom(text_size=tokenizer.size, codebook_size=4), tokenizer)


class _Doubling(SentencePieceTokenizer):
    def encode(self, text: str) -> list[int]:
        return 2 * super().encode(text)

    def _refuse_lossy(self, source: str) -> None:
        pass


def test_digits_of_two_tokens_are_refused(sentencepiece_model: bytes) -> None:
    tokenizer = _Doubling(sentencepiece_model)
    with pytest.raises(InputError, match="encodes '0' as ids .* not as one"):
        Vocabulary(VocabLayout.custom(text_size=tokenizer.size, codebook_size=4), tokenizer)


def test_merged_stars_alone_are_harmless() -> None:
    """Qwen has `**` as one token; no meta does."""
    tokenizer = _tokenizer(user_defined_symbols=["**"])
    vocabulary = Vocabulary(VocabLayout.custom(text_size=tokenizer.size, codebook_size=4), tokenizer)
    assert len(vocabulary.meta_ids) == 11


def test_sizes_must_agree(custom: Vocabulary) -> None:
    with pytest.raises(InputError, match="text tokenizer has 360 ids, layout custom 361"):
        Vocabulary(VocabLayout.custom(text_size=361, codebook_size=4), custom.text)


def test_save_and_rebuild(vocabulary: Vocabulary, tmp_path: Path) -> None:
    vocabulary.save(tmp_path / "vocabulary")
    rebuilt = Vocabulary.from_folder(tmp_path / "vocabulary")
    assert rebuilt.identity == vocabulary.identity
    assert rebuilt.layout == vocabulary.layout
    document = [Text(vocabulary.text.encode("A cat, 12*12.")), Image(np.arange(6).reshape(2, 3))]
    assert np.array_equal(encode_document(document, rebuilt), encode_document(document, vocabulary))
    assert not list((tmp_path / "vocabulary").glob("*.tmp"))


def test_damaged_folder(custom: Vocabulary, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read vocabulary"):
        Vocabulary.from_folder(tmp_path)
    custom.save(tmp_path)
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"identity": "sha256:other"}))
    with pytest.raises(InputError, match="was saved as vocabulary sha256:other"):
        Vocabulary.from_folder(tmp_path)


def test_identity_depends_on_all_that_shapes_ids(custom: Vocabulary, emu3: Vocabulary, emu3_5: Vocabulary) -> None:
    larger = Vocabulary(dataclasses.replace(custom.layout, codebook_size=51), custom.text)
    assert len({v.identity for v in (custom, larger, emu3, emu3_5)}) == 4


def test_room_needs_no_torch() -> None:
    code = "import sys, megatron_ext.vocab; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

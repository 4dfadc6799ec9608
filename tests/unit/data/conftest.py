"""A vocabulary for the tests of this room."""

import pytest

from megatron_ext.vocab import Vocabulary
from tests.unit.data.samples import make_vocabulary, train_text_tokenizer


@pytest.fixture(scope="session")
def text_model() -> bytes:
    return train_text_tokenizer()


@pytest.fixture(scope="session")
def vocabulary(text_model) -> Vocabulary:
    return make_vocabulary(text_model)

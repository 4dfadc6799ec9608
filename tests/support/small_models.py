"""A vocabulary, a decoder and a vision tokenizer small enough to build in every test."""

import functools

from megatron_ext.config.model import ModelConfig
from megatron_ext.vision import VisionTokenizerConfig
from megatron_ext.vocab import SentencePieceTokenizer, VocabLayout, Vocabulary
from tokenizer_train.text.train import TextTokenizerTrainConfig, train_model

CODEBOOK_SIZE = 48

DECODER = ModelConfig(
    num_layers=2, hidden_size=48, ffn_hidden_size=64, num_attention_heads=6, num_query_groups=2, kv_channels=8,
    attention_dropout=0.0, hidden_dropout=0.0,
)  # fmt: skip

VISION = VisionTokenizerConfig(
    codebook_size=CODEBOOK_SIZE, ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, attn_resolutions=(3,)
)
"""Eight pixels per code, as Emu3's."""

CORPUS = (
    "A red fox runs through the snow; the fox is red and the snow is white.",
    "一只红色的狐狸在雪地里奔跑。狐狸是红色的，雪是白色的。",
    "two  spaces   and    more, dashes -- --- ----, haha hahaha 哈哈哈哈",
    "for i in range(10):\n\tprint(i)\r\n\n",
    "5 foxes, 64 foxes, 1999 foxes and 0.25 of a fox * 3",
)


@functools.cache
def small_vocabulary() -> Vocabulary:
    """Byte-pair pieces over a few sentences, 48 visual codes."""
    settings = TextTokenizerTrainConfig(input=("unused",), output="unused", vocab_size=440)
    text = SentencePieceTokenizer(train_model(CORPUS * 4, settings))
    return Vocabulary(VocabLayout.custom(text_size=text.size, codebook_size=CODEBOOK_SIZE), text)

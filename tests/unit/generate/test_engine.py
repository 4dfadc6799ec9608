"""The engine on a small random model: cache against full passes, batches against single samples, valid documents."""

import numpy as np
import pytest
import torch
from transformers import Emu3ForCausalLM, Emu3TextConfig

from megatron_ext.config import InputError
from megatron_ext.generate import (
    Prompt,
    SamplingConfig,
    TextDecoder,
    captioning_prompt,
    document_of,
    drawing_prompt,
    generate,
)
from megatron_ext.generate.engine import _without
from megatron_ext.vocab import DocumentError, Grid, Image, Text, Video, encode_document
from megatron_ext.vocab.grammar import Grammar
from tests.support.small_models import small_vocabulary

VOCABULARY = small_vocabulary()
GRAMMAR = Grammar(VOCABULARY)


@pytest.fixture(scope="module")
def decoder() -> TextDecoder:
    torch.manual_seed(0)
    config = Emu3TextConfig(
        vocab_size=VOCABULARY.layout.size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return TextDecoder(Emu3ForCausalLM(config))


class WithoutCache:
    """The oracle: every step is a full pass over each sequence on its own."""

    def __init__(self, decoder: TextDecoder) -> None:
        self.model = decoder.model
        self.sequences: list[torch.Tensor] = []

    def prefill(self, prompts: list[torch.Tensor]) -> torch.Tensor:
        self.sequences = list(prompts)
        return self._logits()

    def step(self, ids_B: torch.Tensor) -> torch.Tensor:
        self.sequences = [torch.cat([s, i[None]]) for s, i in zip(self.sequences, ids_B, strict=True)]
        return self._logits()

    def _logits(self) -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([self.model(input_ids=s[None]).logits[0, -1] for s in self.sequences])


def prompts() -> list[Prompt]:
    """Captions of different lengths, pictures and a clip of different grids."""
    return [
        drawing_prompt("a red fox", Grid(1, 3, 4), VOCABULARY, sample=0),
        drawing_prompt("一只狐狸 in the snow, running", Grid(1, 2, 5), VOCABULARY, negative_prompt="blur", sample=1),
        drawing_prompt("", Grid(2, 2, 2, 8000, 1000), VOCABULARY, sample=2),
    ]


def test_cached_logits_equal_full_passes(decoder: TextDecoder) -> None:
    """Prompts of different lengths in one batch, ten steps."""
    oracle = WithoutCache(decoder)
    ids = [torch.from_numpy(prompt.ids.astype(np.int64)) for prompt in prompts()]
    assert len({len(sequence) for sequence in ids}) > 1
    ours, expected = decoder.prefill(ids), oracle.prefill(ids)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)  # measured 6e-6, logits up to 6
        following = torch.randint(0, VOCABULARY.layout.size, (len(ids),), generator=generator)
        ours, expected = decoder.step(following), oracle.step(following)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drawings_are_documents_and_equal_without_cache(decoder: TextDecoder, temperature: float) -> None:
    config = SamplingConfig(temperature=temperature, top_k=20, guidance_scale=2.0)
    drawn = generate(decoder, GRAMMAR, prompts(), config, seed=5)
    expected = generate(WithoutCache(decoder), GRAMMAR, prompts(), config, seed=5)
    shapes = []
    for prompt, ids, others in zip(prompts(), drawn, expected, strict=True):
        assert ids.tolist() == others.tolist()
        segment = document_of(prompt, ids, VOCABULARY)[-1]
        shapes.append(segment.codes_THW.shape if isinstance(segment, Video) else segment.codes_HW.shape)
    assert shapes == [(3, 4), (2, 5), (2, 2, 2)]


def test_a_sample_does_not_depend_on_its_batch(decoder: TextDecoder) -> None:
    config = SamplingConfig(guidance_scale=2.0)
    together = generate(decoder, GRAMMAR, prompts(), config, seed=5)
    for prompt, ids in zip(prompts(), together, strict=True):
        assert generate(decoder, GRAMMAR, [prompt], config, seed=5)[0].tolist() == ids.tolist()
    again = generate(decoder, GRAMMAR, prompts()[::-1], config, seed=5)[::-1]
    assert [ids.tolist() for ids in again] == [ids.tolist() for ids in together]


def test_the_seed_decides(decoder: TextDecoder) -> None:
    config = SamplingConfig(guidance_scale=1.0)
    first, same, other = (generate(decoder, GRAMMAR, prompts()[:1], config, seed=s)[0].tolist() for s in (1, 1, 2))
    assert first == same != other


def test_guidance_changes_the_drawing_and_scale_one_is_none(decoder: TextDecoder) -> None:
    prompt = prompts()[1]
    unguided = Prompt(**{**vars(prompt), "unconditional": None})

    def ids(what: Prompt, scale: float) -> list[int]:
        config = SamplingConfig(temperature=0, guidance_scale=scale)
        return generate(decoder, GRAMMAR, [what], config, seed=0)[0].tolist()

    assert ids(prompt, 1.0) == ids(unguided, 3.0)
    assert ids(prompt, 6.0) != ids(prompt, 1.0)


def test_captions_end_within_their_length(decoder: TextDecoder) -> None:
    picture = Image(np.arange(6).reshape(2, 3))
    batch = [captioning_prompt(picture, VOCABULARY, max_new_ids=length, sample=length) for length in (1, 2, 7, 30)]
    for prompt, ids in zip(batch, generate(decoder, GRAMMAR, batch, SamplingConfig(), seed=0), strict=True):
        assert 1 <= len(ids) <= prompt.max_new_ids and ids[-1] == VOCABULARY.layout.eos
        segments = document_of(prompt, ids, VOCABULARY)
        assert segments[0] == picture and all(isinstance(segment, Text) for segment in segments[1:])


def test_progress_counts_every_id(decoder: TextDecoder) -> None:
    counts: list[int] = []
    drawn = generate(decoder, GRAMMAR, prompts(), SamplingConfig(guidance_scale=1), seed=0, on_step=counts.append)
    assert sum(counts) == sum(map(len, drawn))


def test_prompts_are_beginnings_of_documents() -> None:
    caption = np.array(VOCABULARY.text.encode("a red fox"))
    picture = Image(np.zeros((3, 4), dtype=np.int64))
    document = encode_document([Text(caption), picture], VOCABULARY)
    prompt = drawing_prompt("a red fox", picture.grid, VOCABULARY)
    assert document[: len(prompt.ids)].tolist() == prompt.ids.tolist()
    assert prompt.unconditional.tolist() == [prompt.ids[0], *prompt.ids[1 + len(caption) :]]
    described = captioning_prompt(picture, VOCABULARY, max_new_ids=9)
    assert described.ids.tolist() == encode_document([picture], VOCABULARY)[:-1].tolist()


def test_bad_prompts_are_refused(decoder: TextDecoder) -> None:
    with pytest.raises(InputError, match="max_new_ids"):
        captioning_prompt(Image(np.zeros((1, 1), dtype=np.int64)), VOCABULARY, max_new_ids=0)
    bad = Prompt(ids=np.array([5]), stop=VOCABULARY.layout.eos, max_new_ids=4)
    with pytest.raises(DocumentError, match="position 0"):
        generate(decoder, GRAMMAR, [bad], SamplingConfig(), seed=0)


def test_without() -> None:
    assert _without([(0, 5), (8, 9)], [2, 8, 100]) == [(0, 2), (3, 5)]

"""An exported folder as a stranger uses it: Auto classes, offline, and the ids of our documents."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from megatron_ext.config import InputError
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.generate import drawing_prompt
from megatron_ext.hf.release import write_release
from megatron_ext.model import build_model
from megatron_ext.runtime import Topology
from megatron_ext.vision import MoVQGAN, VisionTokenizerConfig, from_uint8
from megatron_ext.vocab import (
    Grid,
    Image,
    QwenTokenizer,
    Text,
    VocabLayout,
    Vocabulary,
    encode_document,
)
from tests.support.small_models import DECODER, VISION, small_vocabulary

CAPTION = "two foxes: 一只狐狸  and 3 more 🦊"
EMU3_VISION = VisionTokenizerConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1)
"""Emu3's codebook and spatial factor."""


def export(folder: Path, vocabulary: Vocabulary, vision: VisionTokenizerConfig) -> MoVQGAN:
    torch.manual_seed(0)
    tokenizer = MoVQGAN(vision).eval()
    with torch.no_grad():
        tokenizer.quantize.embedding.weight.normal_()
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        model = build_model(DECODER, ParallelConfig(), vocabulary.layout, topology, seed=3)
        write_release(folder, model, tokenizer, vocabulary, max_position_embeddings=512)
    return tokenizer


@pytest.fixture(scope="module")
def emu3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Vocabulary, MoVQGAN]:
    vocabulary = Vocabulary(VocabLayout.emu3(), QwenTokenizer())
    folder = tmp_path_factory.mktemp("emu3")
    return folder, vocabulary, export(folder, vocabulary, EMU3_VISION)


@pytest.fixture(scope="module")
def custom(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Vocabulary, MoVQGAN]:
    vocabulary = small_vocabulary()
    folder = tmp_path_factory.mktemp("custom")
    return folder, vocabulary, export(folder, vocabulary, VISION)


@pytest.mark.parametrize("released", ["emu3", "custom"])
def test_prompt_of_the_processor_is_ours(released: str, request: pytest.FixtureRequest) -> None:
    folder, vocabulary, _ = request.getfixturevalue(released)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text=CAPTION, return_for_image_generation=True, ratio="2:1", image_area=64 * 128)
    ours = drawing_prompt(CAPTION, Grid(1, 8, 16), vocabulary).ids
    assert inputs["input_ids"] == [ours.tolist()]
    assert inputs["image_sizes"] == [[8, 16]]


@pytest.mark.parametrize("released", ["emu3", "custom"])
def test_document_of_processor_and_model_is_ours(released: str, request: pytest.FixtureRequest) -> None:
    """A picture given to transformers becomes the ids that our tokenizer and document format give it."""
    folder, vocabulary, vision = request.getfixturevalue(released)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    inputs = processor(
        text=f"<image>{CAPTION}", images=[Picture.fromarray(pixels_HWC)], do_resize=False, return_tensors="pt"
    )
    with torch.no_grad():
        filled = model.model.get_image_tokens(inputs["pixel_values"], inputs["image_sizes"])
    ids = inputs["input_ids"][0]
    ids[ids == vocabulary.layout.image_placeholder] = filled.long()
    codes_HW = vision.encode(from_uint8(pixels_HWC)[None])[0].numpy()
    document = encode_document([Image(codes_HW), Text(np.array(vocabulary.text.encode(CAPTION)))], vocabulary)
    assert ids.tolist() == document[:-1].tolist()
    # And back: the ids of the block, from the first visual one to EOS, are drawn by transformers as by us.
    body = document[document.tolist().index(vocabulary.layout.sot) + 1 :][: 4 * 7]
    with torch.no_grad():
        drawn = model.model.decode_image_tokens(torch.from_numpy(np.append(body, [0, 0, 0]))[None], height=4, width=6)
        expected = vision.decode(torch.from_numpy(codes_HW)[None])
        torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)  # measured 9e-6


@pytest.mark.parametrize("released", ["emu3", "custom"])
def test_tokenizer(released: str, request: pytest.FixtureRequest) -> None:
    folder, vocabulary, _ = request.getfixturevalue(released)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(CAPTION)["input_ids"] == vocabulary.text.encode(CAPTION)
    assert tokenizer.decode(vocabulary.text.encode(CAPTION)) == CAPTION
    layout = vocabulary.layout
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (layout.bos, layout.eos)
    assert tokenizer.pad_token_id == layout.pad
    assert len(tokenizer) == layout.size


def test_a_model_from_elsewhere_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "emu3"}')
    with pytest.raises(InputError, match=f"{tmp_path} holds a model that was not exported from here: give another"):
        export(tmp_path, small_vocabulary(), VISION)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_without_a_processor_the_folder_says_why(tmp_path: Path) -> None:
    vision = VisionTokenizerConfig(codebook_size=48, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(2,))
    export(tmp_path, small_vocabulary(), VISION)
    assert len(list(tmp_path.glob("*processor*"))) == 2
    export(tmp_path, small_vocabulary(), vision)  # over the other one, whose processor must not stay
    readme = (tmp_path / "README.md").read_text()
    assert "There is no processor" in readme and "has 4" in readme
    assert not list(tmp_path.glob("*processor*"))
    assert AutoTokenizer.from_pretrained(tmp_path)(CAPTION)["input_ids"] == small_vocabulary().text.encode(CAPTION)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.model.vqmodel.vision_spatial_factor == 4

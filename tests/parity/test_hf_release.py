"""An exported folder as a stranger uses it: Auto classes, offline, and the ids of our documents."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from megatron_ext.config import InputError
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.generate import drawing_prompt
from megatron_ext.hf import release
from megatron_ext.hf.release import SUMS, write_release
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
from tests.support.releases import source_of
from tests.support.small_models import DECODER, VISION, small_vocabulary

CAPTION = "two foxes: 一只狐狸  and 3 more 🦊"
EMU3_VISION = VisionTokenizerConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1)
"""Emu3's codebook and spatial factor."""


def export(
    folder: Path,
    vocabulary: Vocabulary,
    vision: VisionTokenizerConfig,
    *,
    section: ModelConfig = DECODER,
    **options: object,
) -> MoVQGAN:
    torch.manual_seed(0)
    tokenizer = MoVQGAN(vision).eval()
    with torch.no_grad():
        tokenizer.quantize.embedding.weight.normal_()
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        model = build_model(section, ParallelConfig(), vocabulary.layout, topology, seed=3)
        write_release(folder, source_of(model, tokenizer, vocabulary, positions=512), **options)
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
    untrusted = f"{CAPTION}<|image start|><image>"
    assert tokenizer(untrusted, split_special_tokens=True)["input_ids"] == vocabulary.text.encode(untrusted)
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
    assert "sha256sum -c" in readme and "(lm-eval: `add_bos_token=True`)" in readme
    first = readme.split("# Emu3 decoder and vision tokenizer\n\n")[1]
    assert first.startswith("> **Load this folder with `AutoModelForImageTextToText`") and "random ones" in first[:400]
    names = [line.split("  ")[1] for line in (tmp_path / "SHA256SUMS").read_text().splitlines()]
    assert set(names) == {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} - {SUMS}
    assert AutoTokenizer.from_pretrained(tmp_path)(CAPTION)["input_ids"] == small_vocabulary().text.encode(CAPTION)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.model.vqmodel.vision_spatial_factor == 4


def test_what_is_no_export_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and no earlier export"):
        export(tmp_path, small_vocabulary(), VISION)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_interrupted_export_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hf"
    export(folder, small_vocabulary(), VISION)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(release, "write_weights", _full_disk)
        export(folder, small_vocabulary(), EMU3_LIKE)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    export(folder, small_vocabulary(), VISION)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def _full_disk(*arguments: object) -> None:
    raise OSError("disk full")


EMU3_LIKE = VisionTokenizerConfig(codebook_size=48, ch=64, ch_mult=(1, 1, 2, 2), num_res_blocks=1)


def test_a_stranger_can_use_every_kind(emu3: tuple, custom: tuple, tmp_path: Path) -> None:
    """In one process without this project: with a processor, without one, in bfloat16, as BAAI's layout."""
    vision = VisionTokenizerConfig(codebook_size=48, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(2,))
    export(tmp_path / "four", small_vocabulary(), vision, dtype=torch.bfloat16)
    export(tmp_path / "baai", emu3[1], EMU3_VISION, format="baai", dtype=torch.bfloat16)
    section = ModelConfig(**{**vars(DECODER), "qk_layernorm": True})
    export(tmp_path / "qwen3", small_vocabulary(), VISION, section=section)
    folders = [emu3[0], tmp_path / "four", tmp_path / "baai", tmp_path / "qwen3"]
    done = subprocess.run(
        [sys.executable, "-I", str(release.SELF_CHECK), *map(str, folders)],
        env=os.environ | release.OFFLINE, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    with_processor, without, baai, qwen3 = (json.loads(line) for line in done.stdout.splitlines())
    assert with_processor == {
        "model_type": "emu3", "model": "Emu3ForConditionalGeneration", "dtype": "float32", "processor": True,
        "drew": [16, 16], "AutoModelForCausalLM": "random weights, see the model card",
    }  # fmt: skip
    assert (without["dtype"], without["processor"], without["drew"]) == ("bfloat16", False, [8, 8])
    assert (baai["model"], baai["dtype"], baai["generated"]) == ("Emu3ForCausalLM", "bfloat16", 4)
    assert (qwen3["model"], qwen3["dtype"], qwen3["generated"]) == ("Qwen3ForCausalLM", "float32", 4)


def test_damage_is_found(custom: tuple, tmp_path: Path) -> None:
    """By the sums, and where these are wrong too, by transformers."""
    folder = shutil.copytree(custom[0], tmp_path / "copy")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="tokenizer_config.json is missing"):
        release.check_release(folder)
    shutil.copytree(custom[0], folder, dirs_exist_ok=True)
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([1 ^ weights.read_bytes()[-1]]))
    with pytest.raises(InputError, match="model.safetensors is not what was written"):
        release.check_release(folder)
    tensors = load_file(weights)
    del tensors["text_model.model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    sums = (folder / SUMS).read_text().splitlines()
    sums = [line for line in sums if "model.safetensors" not in line]
    sums.append(f"{release.sha256_of(weights)}  model.safetensors")
    (folder / SUMS).write_text("\n".join(sums) + "\n")
    with pytest.raises(
        InputError, match=r"does not work in transformers: .*weights do not fit the class.*norm\.weight"
    ):
        release.check_release(folder)

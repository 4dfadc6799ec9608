"""BAAI's layout, both ways: names, files and fields of BAAI/Emu3-Stage1 and BAAI/Emu3-VisionTokenizer."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Emu3ForCausalLM, Emu3TextConfig

from megatron_ext.checkpoint.decoder import load_weights
from megatron_ext.config import InputError
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.hf import load_decoder_weights, load_vision_from_hf, read_vocabulary
from megatron_ext.hf.baai import DECODER_CODE, VISION_CODE, baai_contents
from megatron_ext.hf.decoder import text_config
from megatron_ext.hf.release import write_release
from megatron_ext.model import build_model
from megatron_ext.plan import PRESETS
from megatron_ext.runtime import Topology
from megatron_ext.vision import MoVQGAN, VisionTokenizerConfig, load_vision_tokenizer
from megatron_ext.vocab import QwenTokenizer, VocabLayout, Vocabulary
from tests.support.releases import source_of
from tests.support.small_models import DECODER, small_vocabulary
from tools import convert_checkpoint

SECTION = ModelConfig(**{**vars(DECODER), "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 2,
                         "num_query_groups": 1, "num_layers": 2})  # fmt: skip
VISION = VisionTokenizerConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1)

# BAAI/Emu3-Stage1's config.json: fields as published, sizes of SECTION.
PUBLISHED = {
    "architectures": ["Emu3ForCausalLM"], "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_emu3.Emu3Config", "AutoModelForCausalLM": "modeling_emu3.Emu3ForCausalLM",
    },
    "boi_token_id": 151852, "bos_token_id": 151849, "eof_token_id": 151847, "eoi_token_id": 151853,
    "eol_token_id": 151846, "eos_token_id": 151850, "hidden_act": "silu", "hidden_size": 16, "image_area": 262144,
    "img_token_id": 151851, "initializer_range": 0.02, "intermediate_size": 24, "max_position_embeddings": 5120,
    "model_type": "Emu3", "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1,
    "pad_token_id": 151643, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000.0,
    "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.44.0", "use_cache": True,
    "vocab_size": 184622,
}  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(VocabLayout.emu3(), QwenTokenizer())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as BAAI's: transformers' own module writes BAAI's names, in several files with an index."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    model = Emu3ForCausalLM(Emu3TextConfig(**text_config(_shape(), VocabLayout.emu3(), 5120)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    model.save_pretrained(folder, max_shard_size="12MB")
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    return folder


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with files of the names of BAAI's."""
    folder = tmp_path_factory.mktemp("code")
    for part, names in (("mllm", DECODER_CODE), ("tokenizer", VISION_CODE)):
        (folder / "emu3" / part).mkdir(parents=True)
        for name in names:
            (folder / "emu3" / part / name).write_text(f"# {name}\n")
    return folder


@pytest.fixture(scope="module")
def vision() -> MoVQGAN:
    torch.manual_seed(0)
    return MoVQGAN(VISION).eval()


@pytest.fixture(scope="module")
def exported(
    published: Path, code: Path, vision: MoVQGAN, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The published folder through our model, written in BAAI's layout."""
    folder = tmp_path_factory.mktemp("exported") / "baai"
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        model = build_model(SECTION, ParallelConfig(), vocabulary.layout, topology, seed=0)
        load_decoder_weights(published, model, topology)
        write_release(folder, source_of(model, vision, vocabulary, 5120), format="baai", remote_code_from=code)
    return folder


def _shape():
    return dataclasses.replace(PRESETS["tiny"], **{k: v for k, v in vars(SECTION).items() if v not in (None, "tiny")})


def _all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_weights_come_back_bitwise(published: Path, exported: Path) -> None:
    assert len(list(published.glob("model-0000?-of-0000?.safetensors"))) > 1
    theirs, ours = _all_tensors(published), _all_tensors(exported)
    assert theirs.keys() == ours.keys() and len(ours) == 9 * 2 + 3
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name


def test_configuration_is_the_published_one(exported: Path) -> None:
    assert json.loads((exported / "config.json").read_text()) == PUBLISHED


def test_tokenizer_files_are_the_published_ones(exported: Path) -> None:
    """Digests of BAAI's files, sizes of those that hold few lines."""
    digests = {name: hashlib.sha256((exported / name).read_bytes()).hexdigest() for name in _DIGESTS}
    assert digests == _DIGESTS
    sizes = {name: (exported / name).stat().st_size for name in _SIZES}
    assert sizes == _SIZES


_DIGESTS = {
    "emu3.tiktoken": "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
    "emu3_vision_tokens.txt": "9113d8c4fe12bc294103df9d46dd28f5c9a1b2f897a20c09f4fd07432b8bdba4",
}
_SIZES = {"generation_config.json": 147, "special_tokens_map.json": 99, "tokenizer_config.json": 364}


def test_vision_tokenizer_is_in_its_published_layout(exported: Path, vision: MoVQGAN) -> None:
    folder = exported / "vision_tokenizer"
    for loaded in (load_vision_tokenizer(folder), load_vision_from_hf(exported)):
        assert loaded.identity == vision.identity
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_emu3visionvq.Emu3VisionVQModel"
    assert json.loads((folder / "preprocessor_config.json").read_text())["spatial_factor"] == 8
    full = {"ch": 256, "ch_mult": [1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [3]}
    assert len(json.dumps(config | full, indent=2)) + 1 == 592  # bytes of BAAI/Emu3-VisionTokenizer's config.json


def test_code_is_the_users_own(exported: Path, code: Path) -> None:
    for folder, part, names in (
        (exported, "mllm", DECODER_CODE),
        (exported / "vision_tokenizer", "tokenizer", VISION_CODE),
    ):
        assert {path.name for path in folder.glob("*.py")} == set(names)
        for name in names:
            assert (folder / name).read_bytes() == (code / "emu3" / part / name).read_bytes()


def test_without_code_no_configuration_names_it(exported: Path, vision: MoVQGAN, tmp_path: Path) -> None:
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        model = build_model(SECTION, ParallelConfig(), VocabLayout.emu3(), topology, seed=0)
        notes = write_release(tmp_path / "x", source_of(model, vision, read_vocabulary(exported)), format="baai")
    assert any("BAAI's Python files are not in this folder" in note for note in notes)
    assert not list(tmp_path.rglob("*.py"))
    assert not any("auto_map" in path.read_text() for path in tmp_path.rglob("*config.json"))


def test_from_hf_and_back_through_the_program(published: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    """From the published folder a checkpoint that megatron-core loads, and from that BAAI's layout again."""
    convert_checkpoint.main(["from-hf", "--hf", str(published), "--output", str(tmp_path / "ours")])
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology, torch.no_grad():
        model = build_model(SECTION, ParallelConfig(), vocabulary.layout, topology, seed=0)
        load_weights(tmp_path / "ours" / "step_00000000", model)
        expected = build_model(SECTION, ParallelConfig(), vocabulary.layout, topology, seed=1)
        load_decoder_weights(published, expected, topology)
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert np.isclose(model.decoder.final_layernorm.weight.abs().max().item(), 1, atol=0.2)
    convert_checkpoint.main(
        ["to-hf", "--checkpoint", str(tmp_path / "ours"), "--output", str(tmp_path / "back"), "--format", "baai",
         "--dtype", "bfloat16", "--check", "false"]
    )  # fmt: skip
    theirs, back = _all_tensors(published), _all_tensors(tmp_path / "back")
    assert theirs.keys() == back.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor.bfloat16(), back[name]), name


@pytest.mark.parametrize(
    ("changed", "layout", "message"),
    [
        ({"qk_layernorm": True}, "emu3", "BAAI's Emu3 has no QK norm"),
        ({"kv_channels": 16}, "emu3", "no other width of heads"),
        ({}, "custom", "vocab.layout is custom"),
    ],
)
def test_what_the_layout_lacks_is_refused(changed: dict, layout: str, message: str, vocabulary: Vocabulary) -> None:
    chosen = vocabulary if layout == "emu3" else small_vocabulary()
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        section = ModelConfig(**{**vars(SECTION), **changed})
        model = build_model(section, ParallelConfig(), chosen.layout, topology, seed=0)
    with pytest.raises(InputError, match=message):
        baai_contents(source_of(model, None, chosen), torch.float32, remote_code_from=None, image_area=1)


def test_code_that_is_missing_or_ambiguous_is_named(exported: Path, code: Path, tmp_path: Path) -> None:
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        model = build_model(SECTION, ParallelConfig(), VocabLayout.emu3(), topology, seed=0)
    source = source_of(model, None, read_vocabulary(exported))
    with pytest.raises(InputError, match="has no versions of configuration_emu3.py"):
        write_release(tmp_path / "x", source, format="baai", remote_code_from=tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / DECODER_CODE[0]).write_text("1")
    (tmp_path / DECODER_CODE[0]).write_text("2")
    with pytest.raises(InputError, match="has 2 versions of configuration_emu3.py"):
        write_release(tmp_path / "x", source, format="baai", remote_code_from=tmp_path)
    with pytest.raises(InputError, match="the transformers format has no code of its own"):
        write_release(tmp_path / "x", source, remote_code_from=code)
    assert not (tmp_path / "x").exists()

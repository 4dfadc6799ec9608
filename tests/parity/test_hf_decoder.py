"""Our decoder and transformers' Emu3ForConditionalGeneration are the same function, for every layout of the ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, Emu3ForCausalLM, Emu3ForConditionalGeneration

import megatron_ext.checkpoint.lazy as lazy_module
from megatron_ext.checkpoint.decoder import load_weights
from megatron_ext.checkpoint.open import find_checkpoint
from megatron_ext.checkpoint.streaming import read_weights, write_weights
from megatron_ext.config import InputError
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.hf import load_decoder_weights, load_vision_from_hf, read_decoder, read_vocabulary
from megatron_ext.hf.decoder import canonical_name
from megatron_ext.hf.release import write_release
from megatron_ext.model import Emu3Model, build_model
from megatron_ext.runtime import Topology
from megatron_ext.vision import MoVQGAN, VisionTokenizerConfig
from megatron_ext.vocab import Vocabulary
from tests.support.distributed import Ranks
from tests.support.exported_decoder import load_release, logits_of_release
from tests.support.releases import source_of
from tests.support.small_models import DECODER, VISION, small_vocabulary

IDS = np.random.default_rng(0).integers(0, small_vocabulary().layout.size, 24)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder, with norms that are not all one."""
    folder = tmp_path_factory.mktemp("release")
    vocabulary = small_vocabulary()
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        model = build_model(DECODER, ParallelConfig(), vocabulary.layout, topology, seed=3)
        randomize_norms(model)
        torch.manual_seed(0)
        write_release(folder, source_of(model, MoVQGAN(VISION).eval(), vocabulary))
    return folder


def randomize_norms(model: Emu3Model) -> None:
    """Weights of one would hide a mix-up."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def loaded(
    release: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, ranks: Ranks
) -> tuple[list[torch.Tensor], Path]:
    """Logits by each rank of a tensor axis that has loaded the release, and the checkpoint that it then saved."""
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    arguments = (str(release), request.param, IDS, str(checkpoint))
    return ranks.run(logits_of_release, request.param, *arguments), checkpoint


def test_logits_equal(release: Path, loaded: tuple[list[torch.Tensor], Path]) -> None:
    theirs = Emu3ForConditionalGeneration.from_pretrained(release).eval()
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(IDS)[None]).logits[0]
    for logits in loaded[0]:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)  # measured 0 on one rank, 1e-7 on two


def test_a_checkpoint_is_read_by_rows(release: Path, loaded: tuple[list[torch.Tensor], Path]) -> None:
    """What megatron-core has written, in shards of one rank and of two, is the release; so are any rows of it."""
    tensors = read_weights(find_checkpoint(loaded[1]))
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        model = load_release(release, topology, ParallelConfig())
    expected = {canonical_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        rows = slice(None)
        if "output_layer" in name or "word_embeddings" in name:
            rows = slice(0, model.layout.size)  # the rows of padding are more on two ranks
        assert tensor.shape[1:] == expected[name].shape[1:], name
        assert torch.equal(tensor.whole()[rows], expected[name][rows]), name
        assert torch.equal(tensor.read(3, 41)[rows], expected[name][3:41]), name


def test_a_checkpoint_written_by_rows_is_megatron_cores(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_module, "PIECE_BYTES", 1000)
    vocabulary = read_vocabulary(release)
    tensors = read_decoder(release, vocabulary.layout).tensors
    assert max(tensor.nbytes for tensor in tensors.values()) > 50_000
    folder = write_weights(tmp_path, tensors, vocabulary, "{}", {})
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        model = build_model(DECODER, ParallelConfig(), vocabulary.layout, topology, seed=0)
        load_weights(folder, model)
        expected = load_release(release, topology, ParallelConfig())
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_loads_without_missing_or_surplus_tensors(release: Path) -> None:
    model, report = AutoModelForImageTextToText.from_pretrained(release, output_loading_info=True)
    assert type(model) is Emu3ForConditionalGeneration
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_round_trip_is_bitwise(release: Path, tmp_path: Path) -> None:
    """Hugging Face -> ours -> Hugging Face: every file of weights and configuration is the same."""
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        model = load_release(release, topology, ParallelConfig())
        vocabulary = read_vocabulary(release)
        write_release(tmp_path, source_of(model, load_vision_from_hf(release), vocabulary))
        padding = model.embedding.word_embeddings.weight[vocabulary.layout.size :]
        assert padding.numel() and not padding.any()
    for path in sorted(release.rglob("*.*")):
        assert path.read_bytes() == (tmp_path / path.relative_to(release)).read_bytes(), path.name


def test_other_layouts_of_the_same_weights(release: Path, tmp_path: Path) -> None:
    """A folder of Emu3ForCausalLM: BAAI's names, no vision tokenizer."""
    theirs = Emu3ForConditionalGeneration.from_pretrained(release)
    text = Emu3ForCausalLM(theirs.config.text_config)
    text.model.load_state_dict(theirs.model.text_model.state_dict())
    text.lm_head.load_state_dict(theirs.lm_head.state_dict())
    text.save_pretrained(tmp_path)
    (tmp_path / "vocabulary").symlink_to(release / "vocabulary")
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        model = load_release(tmp_path, topology, ParallelConfig())
        expected = load_release(release, topology, ParallelConfig())
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    with pytest.raises(InputError, match="no vq_config"):
        load_vision_from_hf(tmp_path)


def test_every_parameter_is_named_once(release: Path) -> None:
    from safetensors import safe_open

    with safe_open(release / "model.safetensors", framework="pt") as file:
        written = list(file.keys())
    theirs = Emu3ForConditionalGeneration.from_pretrained(release)
    # transformers stores model.text_model.* as text_model.model.* (conversion_mapping.py, "emu3").
    stored = [
        name.replace("model.text_model.", "text_model.model.", 1)
        .replace("model.vqmodel.", "vqmodel.", 1)
        .replace("lm_head.", "text_model.lm_head.", 1)
        for name in theirs.state_dict()
    ]
    assert sorted(written) == sorted(stored)


def wrong_shape(folder: str) -> str:
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        other = ModelConfig(**{**vars(DECODER), "ffn_hidden_size": 40})
        model = build_model(other, ParallelConfig(), small_vocabulary().layout, topology, seed=0)
        with pytest.raises(InputError) as error:
            load_decoder_weights(folder, model, topology)
    return str(error.value)


def test_another_shape_is_refused(release: Path) -> None:
    assert "model.ffn_hidden_size is 40" in wrong_shape(str(release))


def test_incomplete_folder_is_refused(release: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(release / "model.safetensors")
    del tensors["text_model.model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((release / "config.json").read_bytes())
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        model = build_model(DECODER, ParallelConfig(), small_vocabulary().layout, topology, seed=0)
        with pytest.raises(InputError, match="k_proj.weight is missing"):
            load_decoder_weights(tmp_path, model, topology)
    tensors["text_model.model.layers.1.self_attn.k_proj.weight"] = torch.zeros(16, 47)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"k_proj.weight is \(16, 47\), config.json says \(16, 48\)"):
        read_decoder(tmp_path, small_vocabulary().layout)
    tensors["text_model.model.layers.2.self_attn.k_proj.weight"] = torch.zeros(16, 48)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="1 tensors belong to no part .*layers.2.self_attn.k_proj"):
        read_decoder(tmp_path, small_vocabulary().layout)


def test_names_of_all_parameters_are_canonical(release: Path) -> None:
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        model = build_model(DECODER, ParallelConfig(), small_vocabulary().layout, topology, seed=0)
        names = {canonical_name(name) for name, _ in model.named_parameters()}
        keys = {tensor.key for tensor in model.sharded_state_dict().values() if hasattr(tensor, "key")}
    # megatron-core keeps all layers of a parameter under one key, without the layer's number.
    assert {name.replace("layers.0.", "layers.").replace("layers.1.", "layers.") for name in names} <= keys


def test_config_is_whole_when_there(release: Path) -> None:
    config = json.loads((release / "config.json").read_text())
    layout = small_vocabulary().layout
    assert len(config["vocabulary_map"]) == layout.size
    assert config["vocabulary_map"]["<image>"] == layout.image_placeholder == config["image_token_id"]
    assert isinstance(read_vocabulary(release), Vocabulary)
    assert VisionTokenizerConfig(**vars(VISION)) == load_vision_from_hf(release).config

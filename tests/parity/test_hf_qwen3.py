"""A decoder with QK norm, as Emu3.5's: exported as Qwen3ForCausalLM it is the same function."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from megatron_ext.config.model import ModelConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.data.batch import Window, collate
from megatron_ext.generate import TextDecoder
from megatron_ext.hf import load_vision_from_hf, read_shape, read_vocabulary
from megatron_ext.hf.release import write_release
from megatron_ext.model import build_model
from megatron_ext.runtime import Topology
from megatron_ext.vision import MoVQGAN
from tests.support.exported_decoder import load_release
from tests.support.releases import source_of
from tests.support.small_models import DECODER, VISION, small_vocabulary

SECTION = ModelConfig(**{**vars(DECODER), "qk_layernorm": True, "kv_channels": 16})
"""Heads wider than the residual stream, as Emu3.5's."""

IDS = np.random.default_rng(0).integers(0, small_vocabulary().layout.size, 24)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A folder, and megatron-core's logits of IDS."""
    folder, vocabulary = tmp_path_factory.mktemp("qwen3"), small_vocabulary()
    torch.manual_seed(0)
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology, torch.no_grad():
        model = build_model(SECTION, ParallelConfig(), vocabulary.layout, topology, seed=3).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
        write_release(folder, source_of(model, MoVQGAN(VISION).eval(), vocabulary))
        window = Window(ids=IDS, labels=IDS, mask=np.ones(24, dtype=bool), boundaries=np.array([0, 24]))
        logits = model.forward_batch(collate([window], [0], "document"), with_loss=False)[
            0, :, : vocabulary.layout.size
        ]
    return folder, logits


def test_logits_equal(exported: tuple[Path, torch.Tensor]) -> None:
    folder, expected = exported
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(theirs) is Qwen3ForCausalLM and not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        logits = theirs.eval()(input_ids=torch.from_numpy(IDS)[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)  # measured 5e-7


def test_round_trip_is_bitwise(exported: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = exported
    assert read_shape(folder).qk_layernorm
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        model = load_release(folder, topology, ParallelConfig())
        write_release(tmp_path / "again", source_of(model, load_vision_from_hf(folder), read_vocabulary(folder)))
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(folder)).read_bytes(), path.name


def test_the_card_says_what_it_is(exported: tuple[Path, torch.Tensor]) -> None:
    card = (exported[0] / "README.md").read_text()
    assert (
        "has QK norm, which transformers' Emu3 classes do not know: it is exported as their `Qwen3ForCausalLM`" in card
    )
    assert "vision_tokenizer/" in card and "pipeline_tag: text-generation" in card
    assert json.loads((exported[0] / "vision_tokenizer" / "config.json").read_text())["model_type"] == "Emu3VisionVQ"


def test_our_generation_takes_the_folder(exported: tuple[Path, torch.Tensor]) -> None:
    folder, expected = exported
    decoder = TextDecoder.from_hf(folder, dtype=torch.float32, device=torch.device("cpu"))
    logits = decoder.prefill([torch.from_numpy(IDS)])[0]
    torch.testing.assert_close(logits, expected[-1], atol=1e-4, rtol=0)  # measured 5e-7
    assert len(AutoTokenizer.from_pretrained(folder)) == small_vocabulary().layout.size

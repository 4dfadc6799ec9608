"""Presets have the published sizes; weights do not depend on the layout; shapes that cannot be are refused."""

import dataclasses
import sys

import pytest
import torch

from megatron_ext.config import InputError
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.model import build_model
from megatron_ext.model.emu3 import Emu3Model, transformer_config
from megatron_ext.plan import DecoderShape, pad_vocabulary
from megatron_ext.runtime import Topology
from megatron_ext.vocab import VocabLayout
from tests.support.decoding import LAYOUT, MODEL


@pytest.fixture(scope="module")
def topology():
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        yield topology


@pytest.mark.parametrize(
    ("preset", "layout", "published"),
    [
        ("emu3_8b", VocabLayout.emu3(), 8_492_011_520),  # Emu3: BAAI's checkpoints, counted on the meta device
        ("emu3_5_34b", VocabLayout.emu3_5(), 34_103_460_864),  # Emu3.5, table 1: 34.1B
    ],
)
def test_presets_have_the_published_number_of_parameters(topology, preset, layout, published):
    shape = DecoderShape.of(ModelConfig(preset=preset))
    with torch.device("meta"):
        decoder = Emu3Model(transformer_config(shape, ParallelConfig(), topology), shape, layout, topology)
    padding = 2 * (pad_vocabulary(layout.size, 1) - layout.size) * shape.hidden_size
    assert sum(parameter.numel() for parameter in decoder.parameters()) - padding == published


def test_initial_weights_are_a_function_of_the_seed(topology):
    def draw(seed):
        return build_model(MODEL, ParallelConfig(), LAYOUT, topology, seed).state_dict()

    one, again, other = draw(1), draw(1), draw(2)
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    assert one[name].equal(again[name]) and not one[name].equal(other[name])
    matrices = [value for key, value in one.items() if key.endswith("weight") and value.dim() == 2]
    drawn = torch.cat([matrix.flatten() for matrix in matrices])
    assert drawn[drawn != 0].std().item() == pytest.approx(0.02, rel=0.02)
    assert one["embedding.word_embeddings.weight"][LAYOUT.size :].count_nonzero() == 0


def test_fp8_shapes_are_checked_against_the_recipe(topology):
    narrow = dataclasses.replace(MODEL, ffn_hidden_size=40)
    asked = dataclasses.replace(topology, fp8_recipe="tensorwise")
    with pytest.raises(InputError, match="ffn_hidden_size .* is 40, runtime.fp8_recipe tensorwise .* multiple of 16"):
        build_model(narrow, ParallelConfig(), LAYOUT, asked, seed=1)


def test_a_missing_transformer_engine_is_named(topology, monkeypatch):
    """Before megatron-core complains about a fusion that nobody chose."""
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)  # what an import of it then raises is real
    on_gpu = dataclasses.replace(topology, device=torch.device("cuda"), dtype=torch.bfloat16)
    with pytest.raises(InputError, match="Transformer Engine does not import"):
        build_model(MODEL, ParallelConfig(), LAYOUT, on_gpu, seed=1)


def test_heads_that_cannot_be_dealt_to_context_ranks_are_refused(topology):
    over_three = dataclasses.replace(topology, context_parallel_size=3)
    with pytest.raises(InputError, match=r"cp_comm_type a2a deals the 4 query groups.* to 3 context ranks"):
        build_model(MODEL, ParallelConfig(cp_comm_type="a2a", context_parallel_size=3), LAYOUT, over_three, seed=1)

"""Published sizes; what a tensor rank holds is checked against live models in test_memory.py."""

import pytest

from megatron_ext.plan import PRESETS, count_parameters
from megatron_ext.vocab import VocabLayout


@pytest.mark.parametrize(
    ("preset", "layout", "published"),
    [
        ("emu3_8b", VocabLayout.emu3(), 8_492_011_520),  # BAAI's checkpoints, counted on the meta device
        ("emu3_5_34b", VocabLayout.emu3_5(), 34_103_460_864),  # Emu3.5, table 1: 34.1B = 31.2B + 2.9B embeddings
    ],
)
def test_published_sizes(preset, layout, published):
    assert count_parameters(PRESETS[preset], layout.size).total == published


def test_tensor_ranks_share_all_but_norms():
    shape = PRESETS["emu3_5_34b"]
    whole, rank = count_parameters(shape, 1024), count_parameters(shape, 1024, 4)
    assert 4 * rank.total - whole.total == 3 * whole.norms

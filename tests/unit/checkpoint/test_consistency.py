"""Master weights beside weights: what rounds to them, and what does not."""

import torch

from megatron_ext.checkpoint import consistency
from megatron_ext.checkpoint.consistency import unlike


def test_elements_that_do_not_round_to_the_weights_are_counted(monkeypatch):
    monkeypatch.setattr(consistency, "PIECE", 16)  # several pieces, the last one cut
    master = torch.randn(10, 5, generator=torch.Generator().manual_seed(0))
    weight = master.bfloat16()
    assert unlike(master, weight) == 0 and unlike(master, master) == 0
    assert not torch.equal(master, weight.float()), "rounding loses something"
    weight[0, 0], weight[9, 4] = 7, 8
    assert unlike(master, weight) == 2
    # Shifted by one, as a padded bucket shifts: nearly all.
    assert unlike(master.flatten().roll(1), master.bfloat16()) > 40


def test_not_a_number_is_like_itself_and_unlike_a_number():
    master = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    assert unlike(master, master.bfloat16()) == 0
    assert unlike(master, torch.tensor([1.0, float("inf"), 0.0, 1e-40]).bfloat16()) == 1

"""Parameter groups that one Adam saved and another loads."""

import torch

from megatron_ext.checkpoint.decoder import complete_groups


class FusedLike(torch.optim.Optimizer):
    """The group entries of Transformer Engine's FusedAdam (fused_adam.py, `defaults`), whose kernels need a GPU."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0, "bias_correction": True, "betas": (0.5, 0.5), "eps": 1.0})


def test_groups_of_torch_adamw_become_those_of_another_adam():
    weight = torch.nn.Parameter(torch.ones(2))
    saved = torch.optim.AdamW([weight], lr=0.25, betas=(0.9, 0.95)).state_dict()
    saved["param_groups"][0]["step"] = 7.0  # as megatron-core stores it (distrib_optimizer.py:871)
    optimizer = FusedLike([weight])
    optimizer.load_state_dict(saved)
    assert "bias_correction" not in optimizer.param_groups[0], (
        "torch now keeps an optimizer's own entries: drop the fix"
    )
    complete_groups(optimizer)
    (group,) = optimizer.param_groups
    assert group["bias_correction"] is True and (group["lr"], group["betas"]) == (0.25, (0.9, 0.95))
    assert group["step"] == 7 and isinstance(group["step"], int)


def test_groups_of_another_adam_let_torch_adamw_step():
    """torch completes these itself; a version that no longer did would fail here."""
    weight = torch.nn.Parameter(torch.ones(2))
    saved = FusedLike([weight]).state_dict()
    saved["state"] = {0: {"exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2), "step": torch.tensor(3.0)}}
    optimizer = torch.optim.AdamW([weight])
    optimizer.load_state_dict(saved)
    complete_groups(optimizer)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 4 and weight.max() < 1

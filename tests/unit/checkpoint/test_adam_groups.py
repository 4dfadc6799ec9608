"""Parameter groups that one Adam saved and another loads."""

import torch

from megatron_ext.checkpoint.repairs import own_groups


class FusedLike(torch.optim.Optimizer):
    """The group entries of Transformer Engine's FusedAdam (fused_adam.py, `defaults`), whose kernels need a GPU."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0, "bias_correction": True, "betas": (0.5, 0.5), "eps": 1.0})


def loaded(optimizer, saved):
    """The one group of `optimizer` after a load, as megatron-core does it."""
    groups = own_groups(saved["param_groups"], optimizer.param_groups)
    optimizer.load_state_dict({**saved, "param_groups": [{**group, "params": [0]} for group in groups]})
    (group,) = optimizer.param_groups
    return group


def test_a_load_keeps_the_settings_of_the_run_and_takes_the_number_of_updates():
    weight = torch.nn.Parameter(torch.ones(2))
    saved = torch.optim.AdamW([weight], lr=0.25, betas=(0.9, 0.95)).state_dict()
    saved["param_groups"][0]["step"] = 7.0  # as megatron-core stores it (distrib_optimizer.py:871)
    group = loaded(FusedLike([weight]), saved)
    assert group["bias_correction"] is True and (group["lr"], group["betas"]) == (1.0, (0.5, 0.5))
    assert group["step"] == 7 and isinstance(group["step"], int)
    assert group["params"] == [weight]


def test_groups_of_another_adam_let_torch_adamw_step():
    weight = torch.nn.Parameter(torch.ones(2))
    saved = FusedLike([weight]).state_dict()
    saved["state"] = {0: {"exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2), "step": torch.tensor(3.0)}}
    optimizer = torch.optim.AdamW([weight])
    assert loaded(optimizer, saved)["betas"] == (0.9, 0.999)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 4 and weight.max() < 1

"""megatron-core: a state saved at one learning rate does not load at another, and brings its own betas and eps.

    python group_keys.py

Needs torch and megatron-core. Loads what an optimizer of other settings has saved: those of this one
should stay.
"""

import torch
from adam_step import Model
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer import TransformerConfig
from one_process import one_process


def optimizer_of(device: torch.device, **settings: float) -> DistributedOptimizer:
    wrapped = DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
        DistributedDataParallelConfig(use_distributed_optimizer=True),
        Model(device),
    )
    config = OptimizerConfig(
        **{"optimizer": "adam", "lr": 0.1, "min_lr": 0.0, "use_distributed_optimizer": True, **settings}
    )
    (optimizer,) = get_megatron_optimizer(config, [wrapped]).chained_optimizers
    optimizer._init_optimizer_states_with_dummy_values()
    return optimizer


def loaded(setting: str, value: float, device: torch.device) -> str:
    """What becomes of a setting that this run has changed."""
    optimizer = optimizer_of(device, **{setting: value})
    try:
        optimizer.load_state_dict(optimizer_of(device).state_dict())
    except KeyError:
        return "no group found"
    names = {"lr": "max_lr", "min_lr": "min_lr", "adam_eps": "eps"}
    after = optimizer.param_groups[0][names[setting]]
    return "kept" if after == value else f"{after} instead of {value}"


def main() -> None:
    """Print what becomes of three settings; exit with 1 where one is not kept."""
    changes = {"lr": 0.2, "min_lr": 0.01, "adam_eps": 1e-3}
    with one_process() as device:
        found = {setting: loaded(setting, value, device) for setting, value in changes.items()}
    for setting, what in found.items():
        print(f"{setting}: {what}")
    raise SystemExit(any(what != "kept" for what in found.values()))


if __name__ == "__main__":
    main()

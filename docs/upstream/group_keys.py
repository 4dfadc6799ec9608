"""megatron-core: a state saved at one learning rate does not load at another, and brings its own betas and eps.

    python group_keys.py

Needs torch and megatron-core. Loads what an optimizer of other settings has saved: those of this one
should stay.
"""

import os

import torch
from adam_step import Model, without_a_gpu
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer import TransformerConfig


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
    before = [dict(group, params=None) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(optimizer_of(device).state_dict())
    except KeyError as error:
        return f"KeyError: {error}"
    names = {"lr": "max_lr", "min_lr": "min_lr", "adam_eps": "eps"}
    after = optimizer.param_groups[0][names[setting]]
    return "kept" if after == before[0][names[setting]] else f"{after} instead of {value}"


def main() -> None:
    """Print what becomes of three settings; exit with 1 where one is not kept."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        without_a_gpu()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29514")
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    found = {
        setting: loaded(setting, value, device)
        for setting, value in (("lr", 0.2), ("min_lr", 0.01), ("adam_eps", 1e-3))
    }
    for setting, what in found.items():
        print(f"{setting}: {what}")
    torch.distributed.destroy_process_group()
    raise SystemExit(any(what != "kept" for what in found.values()))


if __name__ == "__main__":
    main()

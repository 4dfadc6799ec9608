"""megatron-core: master weights and moments behind a padded gradient bucket are saved shifted, the last ones as zeros.

    python padded_buckets.py

Needs torch and megatron-core. Four weights in four buckets, each bucket padded at its end: the fully reshardable state
of the optimizer, made right after its creation, should hold the weights themselves.
"""

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from one_process import one_process

ELEMENTS = 100
"""Of a weight: buckets are padded to multiples of 128."""


class Model(torch.nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        weights = (torch.full((ELEMENTS,), float(number + 1), device=device) for number in range(4))
        self.weights = torch.nn.ParameterList(weights)


def saved_masters(bucket_size: int, device: torch.device) -> list[list[float]]:
    """Values that the state to be saved has as the master weights of each weight, in the order of the model."""
    model = Model(device)
    wrapped = DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
        DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=bucket_size
        ),
        model,
    )
    config = OptimizerConfig(optimizer="adam", lr=0.0, min_lr=0.0, weight_decay=0.0, use_distributed_optimizer=True)
    (optimizer,) = get_megatron_optimizer(config, [wrapped]).chained_optimizers
    optimizer._init_optimizer_states_with_dummy_values()
    state = optimizer.sharded_state_dict(
        {name: ShardedTensor.from_rank_offsets(name, weight) for name, weight in model.named_parameters()},
        metadata={
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": True,
        },
    )
    masters = {entry["param"].key: entry["param"].data for entry in state["param_state"].values()}
    return [masters[key].unique(sorted=True).tolist() for key in sorted(masters)]


def main() -> None:
    """Print the state of one bucket and of four; exit with 1 where they differ."""
    with one_process() as device:
        one, four = saved_masters(10**6, device), saved_masters(1, device)
    print(f"one bucket:                 {one}")
    print(f"four, each padded by 28:    {four}")
    raise SystemExit(one != four)


if __name__ == "__main__":
    main()

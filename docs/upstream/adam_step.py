"""megatron-core: after DistributedOptimizer.load_state_dict, torch's AdamW counts one step per parameter.

    python adam_step.py

Needs torch and megatron-core, neither Transformer Engine nor Apex (with them FusedAdam is taken, which keeps its step
in the parameter groups). Loading what was just saved should change nothing. It makes all parameters share ONE `step`
tensor, which AdamW then increments once for each of them: the bias correction of every later update is wrong.
"""

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from one_process import one_process


class Model(torch.nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.ones(8, 8, device=device) for _ in range(3))

    def loss(self) -> torch.Tensor:
        return sum(((index + 1) * weight**2).mean() for index, weight in enumerate(self.weights))


def train(steps: int, load_after: int | None, device: torch.device) -> tuple[list[float], float]:
    """Adam's step of every parameter after `steps` updates, and the last loss."""
    wrapped = DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
        DistributedDataParallelConfig(use_distributed_optimizer=True),
        Model(device),
    )
    config = OptimizerConfig(
        optimizer="adam", lr=0.1, min_lr=0.0, weight_decay=0.0, clip_grad=0.0, use_distributed_optimizer=True
    )
    optimizer = get_megatron_optimizer(config, [wrapped])
    for step in range(steps):
        if step == load_after:
            optimizer.load_state_dict(optimizer.state_dict())
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        wrapped.module.loss().backward()
        wrapped.finish_grad_sync()
        optimizer.step()
    (inner,) = optimizer.chained_optimizers
    return [state["step"].item() for state in inner.optimizer.state.values()], wrapped.module.loss().item()


def main() -> None:
    """Print both runs; exit with 1 where they differ."""
    with one_process() as device:
        plain, loaded = train(6, None, device), train(6, 3, device)
    print(f"6 updates:                         Adam steps {plain[0]}, loss {plain[1]:.6f}")
    print(f"6 updates, state loaded after 3:   Adam steps {loaded[0]}, loss {loaded[1]:.6f}")
    raise SystemExit(plain != loaded)


if __name__ == "__main__":
    main()

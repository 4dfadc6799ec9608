"""megatron-core: after DistributedOptimizer.load_state_dict, torch's AdamW counts one step per parameter.

    python adam_step.py

Needs torch and megatron-core, neither Transformer Engine nor Apex (with them FusedAdam is taken, which keeps its step
in the parameter groups). Loading what was just saved should change nothing. It makes all parameters share ONE `step`
tensor, which AdamW then increments once for each of them: the bias correction of every later update is wrong.
"""

import os

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig


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


def without_a_gpu() -> None:
    """megatron-core names CUDA in literals; the bug does not depend on the device."""

    def on_cpu(factory):
        return lambda *args, **kwargs: factory(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})

    for name in ("tensor", "zeros", "empty", "zeros_like"):
        setattr(torch, name, on_cpu(getattr(torch, name)))
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.current_stream = torch.cuda.synchronize = lambda *args: None
    type_of = torch.Tensor.type
    torch.Tensor.type = lambda self, *args: (
        type_of(self, *args) if args else type_of(self).replace("torch.", "torch.cuda.", 1)
    )


def main() -> None:
    """Print both runs; exit with 1 where they differ."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        without_a_gpu()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29512")
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    plain, loaded = train(6, None, device), train(6, 3, device)
    print(f"6 updates:                         Adam steps {plain[0]}, loss {plain[1]:.6f}")
    print(f"6 updates, state loaded after 3:   Adam steps {loaded[0]}, loss {loaded[1]:.6f}")
    torch.distributed.destroy_process_group()
    raise SystemExit(plain != loaded)


if __name__ == "__main__":
    main()

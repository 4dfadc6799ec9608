"""Section `parallel`: how the ranks divide the work. What remains of the world size is data parallelism."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks divide the work; what remains of the world size is data parallelism."""

    tensor_model_parallel_size: int = 1
    """Ranks that share the weights of a layer."""

    context_parallel_size: int = 1
    """Ranks that share the tokens of a window."""

    sequence_parallel: bool = False
    """Split activations along the sequence across the tensor axis between the sharded matrix products."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""

"""Section `parallel`: how the ranks divide the work, and what is recomputed. What remains of the world size is data
parallelism. Names are megatron-core's."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.config.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks divide the work, and what is recomputed; what remains of the world size is data parallelism."""

    tensor_model_parallel_size: int = 1
    """Ranks that share the weights of a layer."""

    context_parallel_size: int = 1
    """Ranks that share the tokens of a window."""

    cp_comm_type: Literal["p2p", "all_gather", "a2a"] = "p2p"
    """How Transformer Engine exchanges keys and values over the context axis: in a ring, all at once, or heads for
    tokens (Ulysses). On a CPU they are always gathered."""

    sequence_parallel: bool = False
    """Split activations along the sequence across the tensor axis between the sharded matrix products."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""

    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass already runs; needs overlap_grad_reduce."""

    bucket_size: int | None = None
    """Parameters of a tensor rank that are reduced together, at least, with overlap_grad_reduce; null: megatron-core's
    own, the larger of 40 million and a million per data rank."""

    recompute_granularity: Literal["selective", "full"] | None = None
    """What the backward pass computes again instead of keeping: core attention, whole layers, or (empty) nothing."""

    recompute_method: Literal["uniform", "block"] | None = None
    """With granularity full: keep the input of every recompute_num_layers-th layer, or recompute only the first
    recompute_num_layers layers."""

    recompute_num_layers: int | None = None
    """With granularity full: layers per recomputed unit (uniform) or recomputed layers (block)."""

    def __post_init__(self) -> None:
        if self.bucket_size is not None and self.bucket_size < 1:
            raise InputError(
                f"parallel.bucket_size {self.bucket_size}: must be at least 1; null is megatron-core's own size"
            )
        if self.bucket_size is not None and not self.overlap_grad_reduce:
            raise InputError(
                f"parallel.bucket_size {self.bucket_size} with parallel.overlap_grad_reduce false, which reduces all "
                "gradients at once: set parallel.overlap_grad_reduce to true, or leave the size out"
            )

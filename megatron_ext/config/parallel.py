"""Section `parallel`: how the ranks divide the work, and what is recomputed. What remains of the world size is data
parallelism. Names are megatron-core's."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.config.errors import InputError
from megatron_ext.config.section import Count, Section


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section, section="parallel"):
    """How the ranks divide the work, and what is recomputed; what remains of the world size is data parallelism."""

    tensor_model_parallel_size: Count = 1
    """Ranks that share the weights of a layer."""

    context_parallel_size: Count = 1
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

    bucket_size: Count | None = None
    """Parameters of a tensor rank that are reduced together, at least, with overlap_grad_reduce; null: megatron-core's
    own, the larger of 40 million and a million per data rank."""

    recompute_granularity: Literal["selective", "full"] | None = None
    """What the backward pass computes again instead of keeping: core attention, whole layers, or (empty) nothing."""

    recompute_method: Literal["uniform", "block"] | None = None
    """With granularity full: keep the input of every recompute_num_layers-th layer, or recompute only the first
    recompute_num_layers layers."""

    recompute_num_layers: Count | None = None
    """With granularity full: layers per recomputed unit (uniform) or recomputed layers (block)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise InputError(
                "parallel.sequence_parallel is true with parallel.tensor_model_parallel_size 1: "
                "there is no tensor axis to split along, set it to false"
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise InputError(
                "parallel.overlap_param_gather is true with parallel.overlap_grad_reduce false: "
                "set parallel.overlap_grad_reduce to true as well"
            )
        how = (self.recompute_method, self.recompute_num_layers)
        if None in how if self.recompute_granularity == "full" else how != (None, None):
            raise InputError(
                f"parallel.recompute_granularity {self.recompute_granularity} with parallel.recompute_method "
                f"{self.recompute_method} and parallel.recompute_num_layers {self.recompute_num_layers}: "
                "full needs both (uniform or block, and at least 1), anything else neither"
            )
        if self.bucket_size is not None and not self.overlap_grad_reduce:
            raise InputError(
                f"parallel.bucket_size {self.bucket_size} with parallel.overlap_grad_reduce false, which reduces all "
                "gradients at once: set parallel.overlap_grad_reduce to true, or leave the size out"
            )

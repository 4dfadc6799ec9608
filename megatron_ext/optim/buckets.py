"""The buckets in which gradients are reduced, as megatron-core has laid them out in its buffers."""

from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel


@dataclass(frozen=True)
class Bucket:
    """Neighbouring parameters whose gradients are reduced together."""

    elements: int
    """Parameters, and what aligns them to each other."""

    padded: int
    """Elements with the padding at its end, which the ranks that share the gradients divide."""


def gradient_buckets(model: DistributedDataParallel) -> tuple[Bucket, ...]:
    """Every bucket, in the order of megatron-core's buffers: from the last layer to the first."""
    return tuple(
        Bucket(bucket.numel_unpadded, bucket.grad_data.numel()) for buffer in model.buffers for bucket in buffer.buckets
    )

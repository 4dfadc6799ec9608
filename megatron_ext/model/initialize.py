"""Initial weights as a function of (seed, parameter name): the same model on every layout, padded rows zero.

megatron-core's own initialization draws per rank on CUDA, so that the model would depend on the tensor-parallel size.
"""

import torch
from torch import Tensor

from megatron_ext.runtime import Topology, derive_seed

GATED = "mlp.linear_fc1.weight"
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@torch.no_grad()
def initialize_weights(model: torch.nn.Module, *, std: float, vocab_size: int, seed: int, topology: Topology) -> None:
    """Draw every matrix from N(0, std), full size, and keep this tensor rank's part. Norms stay at one.

    Rows of the embedding and the head from `vocab_size` on are padding: zero.
    """
    size, rank = topology.tensor_parallel_size, topology.tensor_parallel_rank
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        shape = list(parameter.shape)
        sharded = getattr(parameter, "tensor_model_parallel", False)
        if sharded:
            shape[parameter.partition_dim] *= size
        generator = torch.Generator().manual_seed(derive_seed(seed, "weights", name))
        if name in VOCABULARY:
            # The drawn part ends at the last real row, or padding would shift what follows it.
            full = torch.zeros(shape)
            full[:vocab_size].normal_(0.0, std, generator=generator)
        else:
            full = torch.empty(shape).normal_(0.0, std, generator=generator)
        parameter.copy_(shard(full, name, parameter.partition_dim, rank, size) if sharded else full)


def shard(full: Tensor, name: str, dim: int, rank: int, size: int) -> Tensor:
    """Tensor rank `rank`'s part of a parameter; the gate and the up half of the SwiGLU matrix are each divided."""
    if name.endswith(GATED):
        gate, up = full.chunk(2)
        return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank]))
    return full.chunk(size, dim=dim)[rank]

"""How many parameters there are, and how many of them a tensor rank holds."""

from dataclasses import dataclass

from megatron_ext.config.model import DecoderShape


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters, by where they stand."""

    embedding: int
    matrices: int
    """Attention's and the MLP's, of all layers."""
    norms: int
    """Of all layers, and the final one."""
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.matrices + self.norms + self.head


def count_parameters(shape: DecoderShape, vocab_rows: int, tensor_parallel_size: int = 1) -> Parameters:
    """Parameters on one tensor rank: the vocabulary's rows and the matrices are divided, norms are everywhere.

    `vocab_rows`: the vocabulary's size, or `pad_vocabulary` of it for what is really allocated.
    """
    head_norms = 2 * shape.kv_channels if shape.qk_layernorm else 0  # one for all query heads, one for all key heads
    rows = vocab_rows * shape.hidden_size // tensor_parallel_size
    return Parameters(
        embedding=rows,
        matrices=matrix_weights(shape) // tensor_parallel_size,
        norms=shape.num_layers * (2 * shape.hidden_size + head_norms) + shape.hidden_size,
        head=rows,
    )


def matrix_weights(shape: DecoderShape) -> int:
    """Weights of the matrices of all layers, on all tensor ranks together."""
    queries = shape.num_attention_heads * shape.kv_channels
    keys = shape.num_query_groups * shape.kv_channels
    attention = shape.hidden_size * (2 * queries + 2 * keys)  # queries, keys, values; the projection back
    return shape.num_layers * (attention + 3 * shape.hidden_size * shape.ffn_hidden_size)  # gate, up, down


def pad_vocabulary(size: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding and the head: the next multiple of 128 per tensor rank (megatron-core's divisor)."""
    multiple = 128 * tensor_parallel_size
    return -(-size // multiple) * multiple

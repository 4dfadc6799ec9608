"""What a microbatch's forward pass keeps for its backward pass.

The counting of Korthikanti et al. (arXiv 2205.05198, section 4), for a layer with RMSNorm, grouped queries, SwiGLU and
an attention that keeps no scores. Figures are bytes per token of a rank's row. Legend: h hidden size, q and k channels
of all query and of all key heads, f inner width of the MLP, t tensor-parallel size, s the same where sequence
parallelism is on (else 1), b bytes of an activation, p bytes of what a matrix product keeps of its input (1 in fp8).
"""

from megatron_ext.config.model import DecoderShape
from megatron_ext.config.parallel import ParallelConfig

BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}
"""Of an activation, by runtime.precision; fp8 is bf16 with other matrix products."""


def layer_on_gpu(shape: DecoderShape, parallel: ParallelConfig, precision: str) -> float:
    """One layer of Transformer Engine's modules with megatron-core's fusions.

    bf16 with sequence parallelism and dropout: (10h + 4q + 4k + 6f) / t and the softmax's normalizers.
    """
    b, t, s, h, q, k, f = _symbols(shape, parallel, precision)
    p = 1 if precision == "fp8" else b
    norms = 2 * (b * h + p * h + 4) / s  # input, output, 1 / root mean square: LayerNormLinear keeps all three
    heads = (b * (q + 2 * k) + b * q) / t  # rotated queries and keys, values; the context
    normalizers = 4 * shape.num_attention_heads / t if parallel.recompute_granularity != "selective" else 0
    projection = p * q / t if precision == "fp8" else 0  # in bf16 its input is the context that attention keeps
    head_norms = (b * (q + k) + 4 * (shape.num_attention_heads + shape.num_query_groups)) / t
    mlp = (b * 2 * f + p * f) / t  # gate and up; their product
    masks = 2 * h / s if shape.hidden_dropout else 0
    return norms + heads + normalizers + projection + (head_norms if shape.qk_layernorm else 0) + mlp + masks


def layer_on_cpu(shape: DecoderShape, parallel: ParallelConfig, precision: str, seq_length: int) -> float:
    """One layer of plain torch modules, unfused: more is kept. `seq_length`: keys that a query can see."""
    b, t, s, h, q, k, f = _symbols(shape, parallel, precision)
    norms = 2 * (4 * h + 4 * h + 4 + b * h) / s  # torch's RMSNorm keeps its input and the normalized one in fp32
    head_norms = (8 * (q + k) + 4 * (shape.num_attention_heads + shape.num_query_groups)) / t
    rotations = 4 * b * shape.kv_channels  # sines and cosines, once for queries and once for keys
    qkv = b * (q + k + (q + 2 * k)) / t  # values are a view, which keeps what queries and keys were before rotation
    context = (b * q + 4 * shape.num_attention_heads) / t
    if shape.attention_dropout:  # torch then computes in fp32, with keys and values repeated for every query head
        qkv = 4 * 3 * q / t
        context = 3 * 4 * shape.num_attention_heads * seq_length / t
    if parallel.recompute_granularity == "selective":
        qkv, context = b * (q + k + (q + 2 * k)) / t, 0
    projection = b * q / t
    mlp = b * (2 * f + 3 * f) / t  # gate and up; silu(gate), up once more, their product
    masks = 2 * b * h / s if shape.hidden_dropout else 0
    kept = norms + rotations + qkv + context + projection + mlp + masks
    return kept + (head_norms if shape.qk_layernorm else 0)


def ends_on_gpu(shape: DecoderShape, parallel: ParallelConfig, precision: str) -> float:
    """Before the first layer and after the last: dropout of the embeddings, final norm, chunked head."""
    b, _, s, h, *_ = _symbols(shape, parallel, precision)
    return (h / s if shape.hidden_dropout else 0) + (b * h + 4) / s + _head(b, h)


def ends_on_cpu(shape: DecoderShape, parallel: ParallelConfig, precision: str) -> float:
    """The same in plain torch modules."""
    b, _, s, h, *_ = _symbols(shape, parallel, precision)
    return (b * h / s if shape.hidden_dropout else 0) + (4 * h + 4 * h + 4) / s + _head(b, h)


def _head(b: int, h: int) -> int:
    """model/lm_head.py: its input, whole also under sequence parallelism; ids, rows, which are here, log-sum-exp."""
    return b * h + 8 + 8 + 1 + 4


def layer_input(shape: DecoderShape, parallel: ParallelConfig, precision: str) -> float:
    """What is left of a layer whose forward pass is computed again: the residual stream before it."""
    b, _, s, h, *_ = _symbols(shape, parallel, precision)
    return b * h / s


def _symbols(shape: DecoderShape, parallel: ParallelConfig, precision: str) -> tuple[int, ...]:
    """b, t, s, h, q, k, f of the module's legend."""
    tensor = parallel.tensor_model_parallel_size
    return (
        BYTES[precision],
        tensor,
        tensor if parallel.sequence_parallel else 1,
        shape.hidden_size,
        shape.num_attention_heads * shape.kv_channels,
        shape.num_query_groups * shape.kv_channels,
        shape.ffn_hidden_size,
    )

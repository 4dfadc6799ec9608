"""Floating-point operations of training, by the causal convention."""

from megatron_ext.config.model import DecoderShape
from megatron_ext.plan.parameters import matrix_weights


def flops_per_token(shape: DecoderShape, seq_length: int, *, vocab_size: int) -> float:
    """Model FLOPs per trained token, forward and backward, in a segment of `seq_length` tokens.

    A multiply-add is two operations, and the backward pass costs twice the forward one (a gradient for the input and
    one for the weight of every matrix product), so each product counts 3 x 2:

    - matrices: every token meets every weight of the layers' matrices and of the head once: 6 x those weights. The
      embedding is a lookup, and norms, RoPE, SwiGLU and softmax are left out: together below 0.1 %. `vocab_size` is
      the real one; rows that pad the head to the hardware's liking are not the model's work.
    - attention: a query meets its keys twice (scores, and the weighted sum of values), each over heads x channels, in
      every layer: 6 x 2 x layers x width x keys. Causally the token at position p sees p + 1 keys, (seq_length + 1) / 2
      on average; the convention drops the 1: 6 x layers x width x seq_length. Grouped queries save memory, not work.

    This is the convention of Megatron-Bridge and of NeMo since 2025-04; older figures (PaLM's, llm-foundry's) count the
    masked half of the scores too, and read up to twice as high at long context. Recomputation is hardware's work, not
    the model's: it is never counted. With data.attention_scope document, the documents' lengths are the segments';
    throughput is still quoted at the window's length by convention.
    """
    width = shape.num_attention_heads * shape.kv_channels
    matrices = 6 * (matrix_weights(shape) + shape.hidden_size * vocab_size)
    return matrices + 6 * shape.num_layers * width * seq_length

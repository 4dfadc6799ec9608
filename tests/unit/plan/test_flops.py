"""FLOPs per token against published figures and against a count of every product of a small decoder."""

import pytest

from megatron_ext.plan import PRESETS, DecoderShape, flops_per_token

LLAMA3_8B = DecoderShape(
    num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8, kv_channels=128
)
LLAMA2_7B = DecoderShape(
    num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, num_query_groups=32, kv_channels=128
)


@pytest.mark.parametrize(
    ("shape", "vocab_size", "seq_length", "tokens_per_second", "printed", "causal"),
    [
        # Megatron-Bridge, performance summary of container 25.11.
        (LLAMA3_8B, 128_256, 8192, 14_451, 744e12, True),
        # Megatron-LM, examples/llama; NeMo 24.07. Both count the masked half of the scores as well.
        (LLAMA3_8B, 128_256, 8192, 13_812, 800e12, False),
        (LLAMA2_7B, 32_000, 4096, 16_934, 780e12, False),
    ],
)
def test_printed_throughput(shape, vocab_size, seq_length, tokens_per_second, printed, causal):
    """Tokens/s and FLOP/s that NVIDIA printed side by side (per GPU)."""
    flops = flops_per_token(shape, seq_length, vocab_size=vocab_size)
    if not causal:
        flops += flops - flops_per_token(shape, 0, vocab_size=vocab_size)
    assert flops * tokens_per_second == pytest.approx(printed, rel=1e-3)  # measured: 5e-4; three digits are printed


@pytest.mark.parametrize(("seq_length", "giga"), [(5_120, 50.4), (131_072, 149.5)])
def test_emu3_8b(seq_length, giga):
    assert round(flops_per_token(PRESETS["emu3_8b"], seq_length, vocab_size=184_622) / 1e9, 1) == giga


def test_count_of_every_product():
    """Multiply-adds of one forward pass, product by product; heads x channels is not the hidden size here."""
    shape = DecoderShape(
        num_layers=3, hidden_size=24, ffn_hidden_size=40, num_attention_heads=8, num_query_groups=2, kv_channels=5
    )
    tokens, vocab_size = 1000, 77
    layer = (
        tokens * 24 * (8 + 2 + 2) * 5  # queries, keys, values
        + 2 * 8 * 5 * sum(position + 1 for position in range(tokens))  # scores; weighted sum of values
        + tokens * 8 * 5 * 24
        + tokens * 24 * 2 * 40
        + tokens * 40 * 24
    )
    forward = 3 * layer + tokens * 24 * vocab_size
    found = flops_per_token(shape, tokens, vocab_size=vocab_size) * tokens
    assert found == pytest.approx(3 * 2 * forward, rel=1 / tokens)

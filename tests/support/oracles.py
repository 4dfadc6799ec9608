"""Plain references, written from the definitions and sharing no code with what they judge.

Shape legend: T tokens of a row, H hidden size, N query heads, K key-value heads, D channels per head, V ids.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def transformer_engine_indices(cu_seqlens: list[int], total: int, size: int, rank: int) -> list[int]:
    """Transformer Engine's kernel thd_partition_indices_kernel (common/fused_attn/context_parallel.cu), token by token:
    the i-th token of a rank lies in the first or second half of its sequence's share, which says the chunk."""
    local = [end // size for end in cu_seqlens]
    result = []
    for token in range(total // size):
        sequence = max(n for n in range(len(local) - 1) if local[n] <= token)
        length = local[sequence + 1] - local[sequence]
        index = token - local[sequence]
        chunk = rank if index < length // 2 else (size - 1) * 2 - rank
        result.append(local[sequence] * size + length // 2 * chunk + index)
    return result


def segment_mask(bounds: list[int]) -> Tensor:
    """bool mask_TT: whether a token (first axis) sees another: the same segment, and not later."""
    segment = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    position = np.arange(len(segment))
    return torch.from_numpy((segment[:, None] == segment[None]) & (position[:, None] >= position[None]))


def dense_attention(query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, mask_TT: Tensor) -> Tensor:
    """context_TH: softmax over explicit scores. Heads of a group share keys."""
    repeats = query_TND.size(1) // key_TKD.size(1)
    key_TND, value_TND = (t.repeat_interleave(repeats, dim=1) for t in (key_TKD, value_TKD))
    scores_NTT = torch.einsum("tnd,snd->nts", query_TND, key_TND) / query_TND.size(-1) ** 0.5
    weights_NTT = scores_NTT.masked_fill(~mask_TT, -torch.inf).softmax(dim=-1)
    return torch.einsum("nts,snd->tnd", weights_NTT, value_TND).flatten(1)


def rotate(heads_TND: Tensor, positions_T: Tensor, base: float) -> Tensor:
    """RoPE (arXiv 2104.09864), channels i and i + D/2 as a pair (Llama's order): turned by position x base^(-2i/D)."""
    half = heads_TND.size(-1) // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = (positions_T[:, None].double() * frequencies).float()[:, None]
    first, second = heads_TND[..., :half], heads_TND[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def llama(weights: dict[str, Tensor], shape, tokens_T: Tensor, positions_T: Tensor, mask_TT: Tensor) -> Tensor:
    """logits_TV of a Llama-like decoder in plain torch. `weights`: whole, without padded rows, by our model's names."""
    groups, repeats = shape.num_query_groups, shape.num_attention_heads // shape.num_query_groups

    def norm(name: str, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + shape.layernorm_epsilon) * weights[f"{name}.weight"]

    x_TH = weights["embedding.word_embeddings.weight"][tokens_T]
    for layer in range(shape.num_layers):
        at = f"decoder.layers.{layer}."
        mixed = norm(f"{at}input_layernorm", x_TH) @ weights[f"{at}self_attention.linear_qkv.weight"].t()
        # Rows of linear_qkv: per group its query heads, its key head, its value head.
        mixed = mixed.view(len(tokens_T), groups, repeats + 2, shape.kv_channels)
        query_TND, key_TKD, value_TKD = mixed[:, :, :-2].flatten(1, 2), mixed[:, :, -2], mixed[:, :, -1]
        if shape.qk_layernorm:
            query_TND = norm(f"{at}self_attention.q_layernorm", query_TND)
            key_TKD = norm(f"{at}self_attention.k_layernorm", key_TKD)
        query_TND, key_TKD = (rotate(heads, positions_T, shape.rotary_base) for heads in (query_TND, key_TKD))
        context_TH = dense_attention(query_TND, key_TKD, value_TKD, mask_TT)
        x_TH = x_TH + context_TH @ weights[f"{at}self_attention.linear_proj.weight"].t()
        gate, up = (norm(f"{at}pre_mlp_layernorm", x_TH) @ weights[f"{at}mlp.linear_fc1.weight"].t()).chunk(2, dim=-1)
        x_TH = x_TH + (F.silu(gate) * up) @ weights[f"{at}mlp.linear_fc2.weight"].t()
    return norm("decoder.final_layernorm", x_TH) @ weights["output_layer.weight"].t()

"""A small CLIP with random weights, saved by transformers, and heads of LAION's two layouts on it; their plain form.

Shapes: B pictures, H W pixels, C colour channels, S positions, E embedding.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

SIDE, PATCH, HEADS, LAYERS, PROJECTION = 56, 14, 4, 2, 24


def save_clip(folder: Path, seed: int = 0) -> Path:
    """CLIP's vision half with an embedding of 24 numbers."""
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        image_size=SIDE, patch_size=PATCH, projection_dim=PROJECTION,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    model = CLIPVisionModelWithProjection(config)
    with torch.no_grad():
        for parameter in model.parameters():  # transformers' own start is so small that all pictures look alike
            parameter.normal_(0, 0.3, generator=generator)
    model.save_pretrained(folder)
    return folder


def head_weights(layout: str, seed: int = 0) -> dict[str, Tensor]:
    """`linear` or `improved`; scores lie around 5.5."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "linear":
        sizes = {"": (1, PROJECTION)}
    else:
        widths = (PROJECTION, 1024, 128, 64, 16, 1)
        sizes = {f"layers.{n}.": (widths[i + 1], widths[i]) for i, n in enumerate((0, 2, 4, 6, 7))}
    weights = {}
    for prefix, (rows, columns) in sizes.items():
        # Wide, because the embeddings of a random CLIP lie close together.
        weights[prefix + "weight"] = torch.randn(rows, columns, generator=generator) * math.sqrt(4 / columns)
        weights[prefix + "bias"] = torch.full((rows,), 5.5 if rows == 1 else 0.0)
    return weights


def plain_scores(squares_BHWC: np.ndarray, clip: dict[str, Tensor], head: dict[str, Tensor]) -> Tensor:
    """[B]: CLIP's vision transformer (Radford et al. 2021, section 2.4) and a head, written out in float64."""
    w = {name: tensor.double() for name, tensor in clip.items()}
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).double()
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).double()
    pixels = ((torch.from_numpy(squares_BHWC).double() / 255 - mean) / std).permute(0, 3, 1, 2)
    count, grid = len(pixels), SIDE // PATCH
    patches = pixels.reshape(count, 3, grid, PATCH, grid, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(count, grid**2, -1)
    v = "vision_model."
    tokens = patches @ w[v + "embeddings.patch_embedding.weight"].flatten(1).T
    first = w[v + "embeddings.class_embedding"].expand(count, 1, -1)
    x = torch.cat([first, tokens], 1) + w[v + "embeddings.position_embedding.weight"]
    x = _norm(x, w, v + "pre_layrnorm")
    for layer in range(LAYERS):
        name = f"{v}encoder.layers.{layer}."
        x = x + _attention(_norm(x, w, name + "layer_norm1"), w, name + "self_attn.")
        inner = _linear(_norm(x, w, name + "layer_norm2"), w, name + "mlp.fc1")
        x = x + _linear(inner * torch.sigmoid(1.702 * inner), w, name + "mlp.fc2")
    embedding = _norm(x[:, 0], w, v + "post_layernorm") @ w["visual_projection.weight"].T
    score = embedding / embedding.pow(2).sum(-1, keepdim=True).sqrt()
    for prefix in sorted({name.rpartition(".")[0] for name in head}):
        score = _linear(score, {name: tensor.double() for name, tensor in head.items()}, prefix)
    return score[:, 0]


def _linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    dot = "." if name else ""
    return x @ w[f"{name}{dot}weight"].T + w[f"{name}{dot}bias"]


def _norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"] + w[name + ".bias"]


def _attention(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    q, k, v = (_linear(x, w, f"{name}{part}_proj").unflatten(-1, (HEADS, -1)) for part in "qkv")
    weights = (torch.einsum("bshe,bthe->bhst", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    return _linear(torch.einsum("bhst,bthe->bshe", weights, v).flatten(-2), w, name + "out_proj")

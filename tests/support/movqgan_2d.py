"""A 2D MoVQGAN from its checkpoint alone: plain functions of a dictionary of tensors in SBER's key layout.

The oracle of training from a 2D checkpoint; it knows no shapes but those of the tensors, and shares no code with the
product. Source of the graph: github.com/ai-forever/MoVQGAN movqgan/modules/vqvae, attention after the blocks of every
level that has weights for it.
"""

import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]


def encode(weights: Weights, pixels: torch.Tensor) -> torch.Tensor:
    """Codes [B, h, w] of pictures [B, 3, H, W]."""
    x = _conv(weights, "encoder.conv_in", pixels, 1)
    level = 0
    while f"encoder.down.{level}.block.0.norm1.weight" in weights:
        x = _level(weights, f"encoder.down.{level}", x, None)
        if f"encoder.down.{level}.downsample.conv.weight" in weights:
            x = _conv(weights, f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), 0, stride=2)
        level += 1
    x = _middle(weights, "encoder.mid", x, None)
    x = _conv(weights, "encoder.conv_out", _swish(_norm(weights, "encoder.norm_out", x, None)), 1)
    z = _conv(weights, "quant_conv", x, 0)
    codes = weights["quantize.embedding.weight"]
    rows = z.permute(0, 2, 3, 1).reshape(-1, codes.shape[1])
    return torch.cdist(rows.double(), codes.double()).argmin(1).view(z.shape[0], *z.shape[2:])


def decode(weights: Weights, codes: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, H, W] of codes [B, h, w]."""
    zq = weights["quantize.embedding.weight"][codes].permute(0, 3, 1, 2)
    x = _conv(weights, "decoder.conv_in", _conv(weights, "post_quant_conv", zq, 0), 1)
    x = _middle(weights, "decoder.mid", x, zq)
    levels = sorted({int(name.split(".")[2]) for name in weights if name.startswith("decoder.up.")}, reverse=True)
    for level in levels:
        x = _level(weights, f"decoder.up.{level}", x, zq)
        if f"decoder.up.{level}.upsample.conv.weight" in weights:
            wide = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = _conv(weights, f"decoder.up.{level}.upsample.conv", wide, 1)
    return _conv(weights, "decoder.conv_out", _swish(_norm(weights, "decoder.norm_out", x, zq)), 1)


def random_weights(ch: int, ch_mult: tuple[int, ...], num_blocks: int, num_codes: int, z: int = 4) -> Weights:
    """A checkpoint's tensors, attention at the coarsest level, drawn from torch's global generator."""
    weights: Weights = {}

    def conv(name: str, out: int, into: int, kernel: int) -> None:
        weights[f"{name}.weight"] = torch.randn(out, into, kernel, kernel) / (into * kernel * kernel) ** 0.5
        weights[f"{name}.bias"] = torch.randn(out) * 0.1

    def norm(name: str, width: int, conditioned: bool) -> None:
        inner = f"{name}.norm_layer" if conditioned else name
        weights[f"{inner}.weight"] = 1 + 0.1 * torch.randn(width)
        weights[f"{inner}.bias"] = 0.1 * torch.randn(width)
        if conditioned:
            conv(f"{name}.conv_y", width, z, 1)
            conv(f"{name}.conv_b", width, z, 1)

    def block(name: str, into: int, out: int, conditioned: bool) -> None:
        norm(f"{name}.norm1", into, conditioned)
        conv(f"{name}.conv1", out, into, 3)
        norm(f"{name}.norm2", out, conditioned)
        conv(f"{name}.conv2", out, out, 3)
        if into != out:
            conv(f"{name}.nin_shortcut", out, into, 1)

    def attention(name: str, width: int, conditioned: bool) -> None:
        norm(f"{name}.norm", width, conditioned)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def middle(name: str, width: int, conditioned: bool) -> None:
        block(f"{name}.block_1", width, width, conditioned)
        attention(f"{name}.attn_1", width, conditioned)
        block(f"{name}.block_2", width, width, conditioned)

    widths, last = [ch * multiple for multiple in ch_mult], len(ch_mult) - 1
    conv("encoder.conv_in", ch, 3, 3)
    width = ch
    for level, out in enumerate(widths):
        for index in range(num_blocks):
            block(f"encoder.down.{level}.block.{index}", width, out, False)
            width = out
            if level == last:
                attention(f"encoder.down.{level}.attn.{index}", out, False)
        if level < last:
            conv(f"encoder.down.{level}.downsample.conv", out, out, 3)
    middle("encoder.mid", width, False)
    norm("encoder.norm_out", width, False)
    conv("encoder.conv_out", z, width, 3)
    conv("quant_conv", z, z, 1)
    weights["quantize.embedding.weight"] = torch.randn(num_codes, z)
    conv("post_quant_conv", z, z, 1)
    conv("decoder.conv_in", width, z, 3)
    middle("decoder.mid", width, True)
    for level, out in reversed(list(enumerate(widths))):
        for index in range(num_blocks + 1):
            block(f"decoder.up.{level}.block.{index}", width, out, True)
            width = out
            if level == last:
                attention(f"decoder.up.{level}.attn.{index}", out, True)
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", out, out, 3)
    norm("decoder.norm_out", width, True)
    conv("decoder.conv_out", 3, width, 3)
    return weights


def _conv(weights: Weights, name: str, x: torch.Tensor, padding: int, stride: int = 1) -> torch.Tensor:
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=stride, padding=padding)


def _swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def _norm(weights: Weights, name: str, x: torch.Tensor, zq: torch.Tensor | None) -> torch.Tensor:
    inner = name if zq is None else f"{name}.norm_layer"
    normed = F.group_norm(x, 32, weights[f"{inner}.weight"], weights[f"{inner}.bias"], eps=1e-6)
    if zq is None:
        return normed
    zq = F.interpolate(zq, size=x.shape[-2:], mode="nearest")
    return normed * _conv(weights, f"{name}.conv_y", zq, 0) + _conv(weights, f"{name}.conv_b", zq, 0)


def _block(weights: Weights, name: str, x: torch.Tensor, zq: torch.Tensor | None) -> torch.Tensor:
    h = _conv(weights, f"{name}.conv1", _swish(_norm(weights, f"{name}.norm1", x, zq)), 1)
    h = _conv(weights, f"{name}.conv2", _swish(_norm(weights, f"{name}.norm2", h, zq)), 1)
    return h + (_conv(weights, f"{name}.nin_shortcut", x, 0) if f"{name}.nin_shortcut.weight" in weights else x)


def _attention(weights: Weights, name: str, x: torch.Tensor, zq: torch.Tensor | None) -> torch.Tensor:
    h = _norm(weights, f"{name}.norm", x, zq)
    q, k, v = (_conv(weights, f"{name}.{part}", h, 0).flatten(2) for part in "qkv")
    shares = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * q.shape[1] ** -0.5, dim=2)
    mixed = torch.einsum("bij,bcj->bci", shares, v).reshape(x.shape)
    return x + _conv(weights, f"{name}.proj_out", mixed, 0)


def _middle(weights: Weights, name: str, x: torch.Tensor, zq: torch.Tensor | None) -> torch.Tensor:
    x = _attention(weights, f"{name}.attn_1", _block(weights, f"{name}.block_1", x, zq), zq)
    return _block(weights, f"{name}.block_2", x, zq)


def _level(weights: Weights, name: str, x: torch.Tensor, zq: torch.Tensor | None) -> torch.Tensor:
    index = 0
    while f"{name}.block.{index}.conv1.weight" in weights:
        x = _block(weights, f"{name}.block.{index}", x, zq)
        if f"{name}.attn.{index}.q.weight" in weights:
            x = _attention(weights, f"{name}.attn.{index}", x, zq)
        index += 1
    return x

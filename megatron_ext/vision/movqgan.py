"""The Emu3 vision tokenizer: a MoVQGAN with causal temporal layers, encode and decode.

Module names are those of BAAI's released checkpoint, so its tensors load as they are.
Shapes: B batch, T frames, t latent frames, C colour channels, H W pixels, h w code grid, Z latent channels,
D codebook vector size, N = B * T frames.
Source: github.com/baaivision/Emu3 emu3/tokenizer/modeling_emu3visionvq.py, cited as E3 with line numbers.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext.config import InputError
from megatron_ext.runtime.arithmetic import full_fp32
from megatron_ext.vision.blocks import (
    AttentionBlock,
    CausalConv3d,
    Downsample,
    MiddleBlock,
    Norm,
    Past,
    ResnetBlock,
    SpatialNorm,
    TemporalDownsample,
    TemporalResBlock,
    TemporalUpsample,
    Upsample,
    activated,
)
from megatron_ext.vision.quantizer import build_quantizer
from megatron_ext.vision.shape import VisionTokenizerConfig

PREPROCESSING = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": "bicubic", "clips": "chunks"}
"""What turns a picture of any size into the network's input and a clip into calls: part of a tokenizer's identity."""

ARITHMETIC = {"products": "fp32", "variance": "two passes"}
"""How codes are computed on every device, part of the identity too: TF32 or E[x^2] - E[x]^2 give other codes."""

PIXELS_AT_ONCE = {"cpu": 1 << 16, "other": 1 << 20}
"""Pixels that go through a 2D network together where no gradient is wanted; frames are independent there. One frame of
256 x 256 keeps a CPU busy, a GPU wants more. The widest maps of Emu3's decoder take 5 KB a pixel in fp32."""

DECODING_HALF = ("decoder", "post_quant_conv")
"""Modules that codes do not depend on."""


@dataclass(frozen=True, kw_only=True)
class CodesOrigin:
    """Whose codes a tokenizer has whose decoding half alone was trained further."""

    identity: str
    """`MoVQGAN.identity` before that training."""

    encoding_digest: str
    """`MoVQGAN.encoding_digest`, then and for as long as the identity holds."""


def _stage(blocks: list[nn.Module], attention: list[nn.Module]) -> nn.Module:
    stage = nn.Module()
    stage.block = nn.ModuleList(blocks)
    stage.attn = nn.ModuleList(attention)
    return stage


def _run_stage(stage: nn.Module, x_NCHW: Tensor, zq_NZhw: Tensor | None = None) -> Tensor:
    for index, block in enumerate(stage.block):
        x_NCHW = block(x_NCHW, zq_NZhw)
        if len(stage.attn):
            x_NCHW = stage.attn[index](x_NCHW, zq_NZhw)
    return x_NCHW


class Encoder(nn.Module):
    """Pixels to latents: a 2D network on every frame, then temporal layers on the small latent (E3:471-593)."""

    def __init__(self, config: VisionTokenizerConfig) -> None:
        super().__init__()
        widths, z = config.widths, config.z_channels
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = config.ch
        for level, out_width in enumerate(widths):
            blocks = [ResnetBlock(width if i == 0 else out_width, out_width) for i in range(config.num_res_blocks)]
            attends = level in config.attn_resolutions
            stage = _stage(blocks, [AttentionBlock(out_width) for _ in blocks] if attends else [])
            if level < len(widths) - 1:
                stage.downsample = Downsample(out_width)
            self.down.append(stage)
            width = out_width
        self.mid = MiddleBlock(width)
        self.norm_out = Norm(width)
        self.conv_out = nn.Conv2d(width, z, 3, padding=1)
        self.time_conv = nn.ModuleList(TemporalDownsample(z) for _ in range(config.num_time_convs))
        self.time_res_stack = nn.ModuleList(TemporalResBlock(z) for _ in range(config.num_res_blocks))

    def frames(self, pixels_NCHW: Tensor) -> Tensor:
        """The 2D part: latents [N, Z, h, w] of single frames."""
        h_NCHW = self.conv_in(pixels_NCHW.contiguous(memory_format=torch.channels_last))
        for stage in self.down:
            h_NCHW = _run_stage(stage, h_NCHW)
            if hasattr(stage, "downsample"):
                h_NCHW = stage.downsample(h_NCHW)
        return self.conv_out(activated(self.norm_out, self.mid(h_NCHW)))

    def time(self, h_BZThw: Tensor, past: Past | None = None) -> Tensor:
        """The temporal part: [B, Z, t, h, w] with t = T / temporal factor; after the frames that `past` remembers."""
        for conv in self.time_conv:
            h_BZThw = F.silu(conv(h_BZThw, past))
        for block in self.time_res_stack:
            h_BZThw = block(h_BZThw, past)
        return h_BZThw


class Decoder(nn.Module):
    """Quantised map to pixels: temporal layers, then a 2D network on every frame that is wanted (E3:596-720)."""

    def __init__(self, config: VisionTokenizerConfig) -> None:
        super().__init__()
        widths, z = config.widths, config.z_channels
        self.time_res_stack = nn.ModuleList(TemporalResBlock(z) for _ in range(config.num_res_blocks))
        self.time_conv = nn.ModuleList(TemporalUpsample(z) for _ in range(config.num_time_convs))
        width = widths[-1]
        self.conv_in = nn.Conv2d(z, width, 3, padding=1)
        self.mid = MiddleBlock(width, z)
        stages = []
        for level, out_width in reversed(list(enumerate(widths))):
            count = config.num_res_blocks + 1
            blocks = [ResnetBlock(width if i == 0 else out_width, out_width, z) for i in range(count)]
            attends = level in config.attn_resolutions
            stage = _stage(blocks, [AttentionBlock(out_width, z) for _ in blocks] if attends else [])
            if level > 0:
                stage.upsample = Upsample(out_width)
            stages.append(stage)
            width = out_width
        self.up = nn.ModuleList(reversed(stages))
        self.norm_out = SpatialNorm(width, z)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def time(self, h_BZthw: Tensor, past: Past | None = None) -> Tensor:
        """The temporal part, the same layers for the latent and for the map that conditions the norms."""
        for block in self.time_res_stack:
            h_BZthw = block(h_BZthw, past)
        for conv in self.time_conv:
            h_BZthw = F.silu(conv(h_BZthw, past))
        return h_BZthw

    def frames(self, h_NZhw: Tensor, zq_NZhw: Tensor) -> Tensor:
        """The 2D part: pixels [N, C, H, W] of single frames."""
        h_NZhw, zq_NZhw = (x.contiguous(memory_format=torch.channels_last) for x in (h_NZhw, zq_NZhw))
        h_NCHW = self.mid(self.conv_in(h_NZhw), zq_NZhw)
        for stage in reversed(self.up):
            h_NCHW = _run_stage(stage, h_NCHW, zq_NZhw)
            if hasattr(stage, "upsample"):
                h_NCHW = stage.upsample(h_NCHW)
        return self.conv_out(activated(self.norm_out, h_NCHW, zq_NZhw))


def _few_at_once(network: Callable[..., Tensor], maps: Sequence[Tensor], pixels: int) -> Tensor:
    """`network` of maps of N frames of `pixels` pixels each, PIXELS_AT_ONCE where no gradient is wanted."""
    if torch.is_grad_enabled():
        return network(*maps)
    limit = PIXELS_AT_ONCE["cpu" if maps[0].device.type == "cpu" else "other"]
    parts = zip(*(x.split(max(1, limit // pixels)) for x in maps), strict=True)
    return torch.cat([network(*part).contiguous() for part in parts])


class MoVQGAN(nn.Module):
    """Pictures and clips to visual codes and back; pixels are in [-1, 1].

    A picture is a clip that stands still for temporal_downsample_factor frames, as upstream; its 2D network runs
    once, because equal frames have equal latents, and the decoder draws the one frame that is returned.
    """

    def __init__(self, config: VisionTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.origin: CodesOrigin | None = None
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = build_quantizer(config.quantizer, config.codebook_size, config.embed_dim)
        self.quant_conv = CausalConv3d(config.z_channels, config.embed_dim, (3, 1, 1))
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.z_channels, (3, 1, 1))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):  # E3:734-746; the biases keep torch's default, as there
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.Conv2d):  # as the maps lie
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)

    @property
    def identity(self) -> str:
        """16 hexadecimal digits that name the codes.

        Equal identities give equal codes for equal pixels; datasets of different ones must not be blended. It is
        `digest`, except that a tokenizer keeps the identity of its `origin` while it encodes as that did.
        """
        if self.origin is not None and self.origin.encoding_digest == self.encoding_digest:
            return self.origin.identity
        return self.digest

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the SHA-256 of configuration, preprocessing and every tensor's name and contents."""
        return self._digest(self.state_dict())

    @property
    def encoding_digest(self) -> str:
        """The same without the tensors of the decoding half."""
        tensors = self.state_dict().items()
        return self._digest({name: tensor for name, tensor in tensors if name.split(".")[0] not in DECODING_HALF})

    def _digest(self, tensors: dict[str, Tensor]) -> str:
        digest = hashlib.sha256()
        digest.update(json.dumps([self.config.fields(), PREPROCESSING, ARITHMETIC], sort_keys=True).encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def latents(self, pixels: Tensor, past: Past | None = None) -> Tensor:
        """Vectors before quantisation, [B, D, t, h, w], of pictures [B, C, H, W] (t = 1) or clips [B, T, C, H, W].

        `past` remembers the end of a clip for its next piece, and is written to.

        Raises:
            InputError: sides that are no multiple of the spatial factor, frames that are none of the temporal one.
        """
        self._check_size(pixels)
        frames_NCHW = pixels if pixels.ndim == 4 else pixels.flatten(0, 1)
        area = pixels.shape[-2] * pixels.shape[-1]
        frames_NZhw = _few_at_once(self.encoder.frames, (frames_NCHW,), area)
        if pixels.ndim == 4:
            h_BZThw = frames_NZhw.unsqueeze(2).expand(-1, -1, self.config.temporal_downsample_factor, -1, -1)
        else:
            h_BZThw = frames_NZhw.unflatten(0, pixels.shape[:2]).transpose(1, 2)
        return self.quant_conv(self.encoder.time(h_BZThw, past), past)

    def render(self, quantized_BDthw: Tensor, past: Past | None = None) -> Tensor:
        """All frames [B, T, C, H, W] of quantised vectors; `past` as in `latents`."""
        h_BZThw, zq_BZThw = self._decoded_in_time(quantized_BDthw, past)
        batch, _, frames = h_BZThw.shape[:3]
        maps = [x.transpose(1, 2).flatten(0, 1) for x in (h_BZThw, zq_BZThw)]
        return self._draw(maps).unflatten(0, (batch, frames))

    def render_first_frame(self, quantized_BDthw: Tensor) -> Tensor:
        """The first frame [B, C, H, W] of quantised vectors, without drawing the others."""
        return self._draw([x[:, :, 0] for x in self._decoded_in_time(quantized_BDthw)])

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes, int64: pictures [B, C, H, W] -> [B, h, w]; clips [B, T, C, H, W] -> [B, t, h, w]."""
        return self._codes(pixels).squeeze(1) if pixels.ndim == 4 else self._codes(pixels)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pixels: codes [B, h, w] -> pictures [B, C, H, W]; codes [B, t, h, w] -> clips [B, T, C, H, W]."""
        return self._pixels(codes)

    @torch.no_grad()
    def encode_stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Codes [B, t, h, w] of each piece [B, T, C, H, W] of a clip: together those of `encode` of the whole clip.

        Memory depends on the piece, not on the clip. In evaluation mode: batch norms that are trained see a piece.

        Raises:
            InputError: a piece is no clip, or not a multiple of the temporal factor.
        """
        past: Past = {}
        for pixels_BTCHW in pieces:
            if pixels_BTCHW.ndim != 5:
                raise InputError(f"piece of shape {tuple(pixels_BTCHW.shape)}: must be a clip [B, T, C, H, W]")
            yield self._codes(pixels_BTCHW, past)

    @torch.no_grad()
    def decode_stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Clips [B, T, C, H, W] of the codes [B, t, h, w] of each piece: together `decode` of all codes."""
        past: Past = {}
        for codes_Bthw in pieces:
            yield self._pixels(codes_Bthw, past)

    def encode_chunks(self, pixels_BTCHW: Tensor) -> Tensor:
        """Codes [B, t, h, w] of clips, each group of temporal_downsample_factor frames on its own.

        This is how BAAI's autoencode.py feeds clips; memory does not grow with the clip's length.
        """
        self._check_size(pixels_BTCHW)
        chunks = pixels_BTCHW.split(self.config.temporal_downsample_factor, dim=1)
        return torch.cat([self.encode(chunk) for chunk in chunks], dim=1)

    def decode_chunks(self, codes_Bthw: Tensor) -> Tensor:
        """Clips [B, T, C, H, W] of codes made by `encode_chunks`."""
        return torch.cat([self.decode(codes) for codes in codes_Bthw.split(1, dim=1)], dim=1)

    @full_fp32()
    def _codes(self, pixels: Tensor, past: Past | None = None) -> Tensor:
        return self.quantize.assign(self.latents(pixels, past))

    @full_fp32()
    def _pixels(self, codes: Tensor, past: Past | None = None) -> Tensor:
        if codes.ndim == 3:
            return self.render_first_frame(self.quantize.lookup(codes.unsqueeze(1)))
        return self.render(self.quantize.lookup(codes), past)

    def _decoded_in_time(self, quantized_BDthw: Tensor, past: Past | None = None) -> tuple[Tensor, Tensor]:
        """Latent and condition after the temporal layers, which take both as one batch (batch norm sees both)."""
        both = torch.cat((self.post_quant_conv(quantized_BDthw, past), quantized_BDthw))
        return self.decoder.time(both, past).chunk(2)

    def _draw(self, maps: Sequence[Tensor]) -> Tensor:
        """Pixels [N, C, H, W] of latent and condition."""
        return _few_at_once(self.decoder.frames, maps, maps[0][0, 0].numel() * self.config.spatial_factor**2)

    def _check_size(self, pixels: Tensor) -> None:
        factor = self.config.spatial_factor
        height, width = pixels.shape[-2:]
        if height % factor or width % factor:
            raise InputError(f"picture of {height}x{width} pixels: both sides must be multiples of {factor}")
        frames = pixels.shape[1] if pixels.ndim == 5 else self.config.temporal_downsample_factor
        if not frames or frames % self.config.temporal_downsample_factor:
            raise InputError(
                f"clip of {frames} frames: must be a multiple of {self.config.temporal_downsample_factor}, "
                "the temporal factor"
            )

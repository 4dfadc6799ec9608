"""What an evaluation counts for each codec, and how it is shown: rows of numbers, a table, a grid of pictures.

Shapes: B samples, T frames (1 of a picture), H W pixels, C colour channels, N frames, D features, K codes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.table import Table
from torch import Tensor

from megatron_ext.files import replacing
from megatron_ext.vision import from_uint8
from tokenizer_train.vision.codebook import perplexity
from tokenizer_train.vision.codecs import Codec, Coded, TokenizerCodec
from tokenizer_train.vision.quality import SSIM_WINDOW, FeatureStatistics, frechet_distance, psnr, ssim

ERROR_GAIN = 4  # errors are a few of 255 levels: invisible at their own size
TITLE_HEIGHT = 14


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Trained networks that judge, each under the name of what it is; None leaves its column out."""

    perceptual_name: str | None
    perceptual: Callable[[Tensor, Tensor], Tensor] | None
    """(pixels [N, C, H, W], target) -> distances [N]."""

    features_name: str | None
    features: Callable[[Tensor], Tensor] | None
    """Pixels [N, C, H, W] in [-1, 1] -> [N, D], for the Frechet distance."""

    device: torch.device

    def features_of(self, frames_NHWC: np.ndarray) -> Tensor | None:
        """Features [N, D] of uint8 frames."""
        if self.features is None:
            return None
        with torch.inference_mode():
            return torch.cat([self.features(self._pixels(frame)) for frame in frames_NHWC])

    def distances(self, decoded_NHWC: np.ndarray, original_NHWC: np.ndarray) -> list[float]:
        """Perceptual distance of each frame."""
        if self.perceptual is None:
            return []
        with torch.inference_mode():
            pairs = zip(decoded_NHWC, original_NHWC, strict=True)
            return [self.perceptual(self._pixels(a), self._pixels(b)).item() for a, b in pairs]

    def _pixels(self, frame_HWC: np.ndarray) -> Tensor:
        return from_uint8(frame_HWC[None]).to(self.device)


@dataclass(kw_only=True)
class Scores:
    """One codec on the pictures, or the clips, of one size."""

    codec: Codec
    kind: str
    """image or video."""

    size: int
    networks: Networks
    samples: int = 0
    frames: int = 0
    bits: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0
    psnr: list[float] = field(default_factory=list)
    """Of every sample, by the mean squared error of all its frames."""

    ssim: list[float] = field(default_factory=list)
    """Of every frame; none where the frames are smaller than its window."""

    perceptual: list[float] = field(default_factory=list)
    """Of every frame."""

    features: FeatureStatistics = field(default_factory=FeatureStatistics)
    counts_K: Tensor | None = None

    def add(self, original_BTHWC: np.ndarray, coded: Coded) -> None:
        """A batch."""
        batch, frames = original_BTHWC.shape[:2]
        self.samples += batch
        self.frames += batch * frames
        self.bits += coded.bits * batch
        self.encode_s += coded.encode_s
        self.decode_s += coded.decode_s
        pairs = zip(original_BTHWC, coded.decoded_BTHWC, strict=True)
        self.psnr += [psnr(original, decoded) for original, decoded in pairs]
        original_NHWC, decoded_NHWC = (x.reshape(-1, *x.shape[2:]) for x in (original_BTHWC, coded.decoded_BTHWC))
        if min(original_NHWC.shape[1:3]) >= SSIM_WINDOW:
            self.ssim += ssim(original_NHWC, decoded_NHWC).tolist()
        self.perceptual += self.networks.distances(decoded_NHWC, original_NHWC)
        if (features_ND := self.networks.features_of(decoded_NHWC)) is not None:
            self.features.add(features_ND)
        if coded.codes is not None:
            size = self.codec.model.config.codebook_size
            counts_K = torch.bincount(coded.codes.flatten(), minlength=size)
            self.counts_K = counts_K if self.counts_K is None else self.counts_K + counts_K

    def row(self, original: FeatureStatistics) -> dict[str, Any]:
        """What is reported; `original` has the features of the same frames before coding."""
        row: dict[str, Any] = {
            "name": self.codec.name, "kind": self.kind, "size": self.size, "samples": self.samples,
            "frames": self.frames, "bits_per_pixel": self.bits / (self.frames * self.size**2),
            "psnr": float(np.mean(self.psnr)), "psnr_of_samples": self.psnr,
        }  # fmt: skip
        if self.ssim:
            row["ssim"] = float(np.mean(self.ssim))
        if self.perceptual:
            row |= {"perceptual": float(np.mean(self.perceptual)), "perceptual_network": self.networks.perceptual_name}
        if self.features.count > 1:
            row |= {"rfid": frechet_distance(original, self.features), "rfid_network": self.networks.features_name}
        if isinstance(self.codec, TokenizerCodec):
            used = int((self.counts_K > 0).sum())
            row |= {
                "vision_tokenizer": self.codec.identity,
                "tokens_per_sample": int(self.counts_K.sum()) / self.samples,
                "codebook_size": len(self.counts_K), "codes_used": used, "perplexity": perplexity(self.counts_K),
                "encode_frames_per_second": self.frames / self.encode_s,
                "decode_frames_per_second": self.frames / self.decode_s,
            }  # fmt: skip
        return row


COLUMNS = (
    ("name", "codec", "{}"), ("kind", "of", "{}"), ("size", "size", "{}"), ("samples", "samples", "{}"),
    ("tokens_per_sample", "tokens", "{:.0f}"), ("bits_per_pixel", "bits/pixel", "{:.3f}"), ("psnr", "PSNR", "{:.2f}"),
    ("ssim", "SSIM", "{:.4f}"), ("perceptual", "", "{:.4f}"), ("rfid", "", "{:.3f}"), ("codes_used", "codes", "{}"),
    ("perplexity", "perplexity", "{:.0f}"), ("encode_frames_per_second", "enc/s", "{:.2f}"),
    ("decode_frames_per_second", "dec/s", "{:.2f}"),
)  # fmt: skip
"""Field of a row, title, format; the networks' columns are titled by the networks."""


def score_table(rows: Sequence[dict[str, Any]], networks: Networks) -> Table:
    """The rows for a console; a column that no row has is left out."""
    table = Table()
    titles = {"perceptual": networks.perceptual_name, "rfid": f"FID in {networks.features_name}"}
    columns = [column for column in COLUMNS if any(column[0] in row for row in rows)]
    for name, title, _ in columns:
        table.add_column(titles.get(name, title), justify="left" if name in ("name", "kind") else "right")
    for row in rows:
        table.add_row(*(shape.format(row[name]) if name in row else "" for name, _, shape in columns))
    return table


def save_comparison(frames: Sequence[np.ndarray], decoded: dict[str, Sequence[np.ndarray]], path: Path) -> None:
    """A PNG with a row for each frame [H, W, C]: the original, then by codec its reconstruction and its error.

    The error is the absolute difference times ERROR_GAIN.
    """
    height, width = frames[0].shape[:2]
    titles = ["original", *(title for name in decoded for title in (name, f"error x{ERROR_GAIN}"))]
    canvas = Image.new("RGB", (len(titles) * width, len(frames) * height + TITLE_HEIGHT), "white")
    for index, title in enumerate(titles):
        strip = Image.new("RGB", (width, TITLE_HEIGHT), "white")  # cuts a long title off at its column's end
        ImageDraw.Draw(strip).text((2, 1), title, fill="black")
        canvas.paste(strip, (index * width, 0))
    for row, original in enumerate(frames):
        pictures = [original]
        for codec_frames in decoded.values():
            error = np.abs(codec_frames[row].astype(np.int16) - original)
            pictures += [codec_frames[row], np.minimum(ERROR_GAIN * error, 255).astype(np.uint8)]
        for column, picture in enumerate(pictures):
            canvas.paste(Image.fromarray(picture), (column * width, row * height + TITLE_HEIGHT))
    with replacing(path) as temporary:
        canvas.save(temporary, format="PNG")

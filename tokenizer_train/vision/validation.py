"""What a training evaluates on the way: held-out media, else the first it trains on, through the tokenizer as in use.

One sample is in memory at a time, beside the few frames that are shown.

Shapes: T frames (1 of a picture), H W pixels, C colour channels, K codes.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_ext.config import InputError
from megatron_ext.files import replacing
from megatron_ext.media import MediaError, Sample
from megatron_ext.vision import MoVQGAN, from_uint8, to_uint8
from tokenizer_train.vision.codebook import perplexity
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig
from tokenizer_train.vision.config_media import MediaConfig
from tokenizer_train.vision.data import TrainingMedia, centred_square, read_inputs
from tokenizer_train.vision.perceptual import PerceptualDistance
from tokenizer_train.vision.quality import SSIM_WINDOW, psnr, ssim

SHOWN_PIXELS = 2**23
"""Of a grid, originals and reconstructions together, but for one frame of each kind: a PNG of some 10 MB."""

SHOWN_FRAMES = 8
"""Of a clip at most, its first ones."""

GRID_COLUMNS = 16
LINE = 2

Shown = tuple[np.ndarray, np.ndarray]
"""A frame and its reconstruction, uint8 [H, W, C]."""


class Media(Protocol):
    """Where the samples come from."""

    pictures: Sequence[Sample]
    clips: Sequence[Sample]

    def whole(self, sample: Sample, max_frames: int) -> np.ndarray | None:
        """Its pixels, as `centred_square`; None where it cannot be used."""


class HeldOut:
    """The media of media.valid_inputs."""

    def __init__(self, config: MediaConfig, chunk_frames: int, limit: int, say: Callable[[str], None]) -> None:
        """The first `limit` pictures and clips that can be used, which decoding them once tells; the others are named,
        to `say`.

        Raises:
            InputError: as `read_inputs`, such as an input that is not there or holds nothing; none can be used.
        """
        index = read_inputs(config.valid_inputs, config.index_dir)
        self._config, self._chunk_frames, self._say = config, chunk_frames, say
        self.pictures: list[Sample] = []
        self.clips: list[Sample] = []
        self._named: set[str] = set()
        for number in range(len(index)):
            found = self.clips if index.is_clip[number] else self.pictures
            if len(found) < limit and self.whole(sample := index[number], chunk_frames) is not None:
                found.append(sample)
        if limit and not (self.pictures or self.clips):
            raise InputError(
                f"media.valid_inputs = {config.valid_inputs}: none of {len(index):,} samples can be used, as named "
                "above: give others, or [] to evaluate the first of media.inputs"
            )

    def whole(self, sample: Sample, max_frames: int) -> np.ndarray | None:
        try:
            return centred_square(sample, self._config, self._chunk_frames, max_frames)
        except MediaError as error:
            if sample.source not in self._named:
                self._named.add(sample.source)
                self._say(f"evaluation skips {sample.source}: {error}")
            return None


class Validation:
    """Evaluates the tokenizer of a training. One rank does it alone."""

    def __init__(
        self,
        config: VisionTokenizerTrainingConfig,
        training: TrainingMedia,
        distances: Mapping[str, PerceptualDistance],
        say: Callable[[str], None],
    ) -> None:
        """`distances` are the networks of the loss, by name; `say` gets a line for each held-out sample that is bad.

        Raises:
            InputError: as `HeldOut`.
        """
        chunk_frames = config.model.temporal_downsample_factor
        self._limit = config.train.eval_samples
        self._max_frames = max(config.train.eval_clip_frames // chunk_frames, 1) * chunk_frames
        self._num_codes = config.model.codebook_size
        self._distances = distances
        self.media: Media = training
        if config.media.valid_inputs:
            self.media = HeldOut(config.media, chunk_frames, self._limit, say)
        # Half of the grid for pictures, half for clips.
        self._shown_of_a_kind = max(SHOWN_PIXELS // (2 * config.media.size**2) // 2, 1)

    @torch.no_grad()
    def judge(self, model: MoVQGAN) -> tuple[dict[str, float], list[Shown]]:
        """`valid_*` numbers of a metrics line, and what is to be shown, of at most eval_samples pictures and clips.

        Means over the pictures of PSNR, SSIM and each perceptual distance, over the clips the same as `..._clips`;
        codes in use by both, and their perplexity. The tokenizer is in evaluation mode and fp32, as in use. Nothing
        where no sample can be used.
        """
        was_training = {module: module.training for module in model.modules()}
        model.eval()
        device = next(model.parameters()).device
        scores: dict[str, list[float]] = {}
        grid: list[Shown] = []
        counts_K = torch.zeros(self._num_codes, dtype=torch.int64)
        for samples, suffix in ((self.media.pictures, ""), (self.media.clips, "_clips")):
            room = self._shown_of_a_kind
            for sample in samples[: self._limit]:
                original = self.media.whole(sample, self._max_frames)
                if original is None:
                    continue
                pixels = from_uint8(original)[None].to(device)
                codes, drawn = _through(model, pixels)
                counts_K += torch.bincount(codes.flatten().cpu(), minlength=self._num_codes)
                frames_THWC, drawn_THWC = (a.reshape(-1, *a.shape[-3:]) for a in (original, to_uint8(drawn)[0]))
                for name, value in self._scores(frames_THWC, drawn_THWC, pixels, drawn).items():
                    scores.setdefault(f"valid_{name}{suffix}", []).append(value)
                pairs = list(zip(frames_THWC, drawn_THWC, strict=True))[: min(SHOWN_FRAMES, room)]
                room -= len(pairs)
                grid += pairs
        for module, mode in was_training.items():
            module.training = mode
        if not scores:
            return {}, []
        line = {name: float(np.mean(values)) for name, values in scores.items()}
        return line | {"valid_codes_used": int((counts_K > 0).sum()), "valid_perplexity": perplexity(counts_K)}, grid

    def _scores(
        self, original_THWC: np.ndarray, drawn_THWC: np.ndarray, pixels: Tensor, drawn: Tensor
    ) -> dict[str, float]:
        scores = {"psnr": psnr(original_THWC, drawn_THWC)}
        if min(original_THWC.shape[1:3]) >= SSIM_WINDOW:
            scores["ssim"] = float(ssim(original_THWC, drawn_THWC).mean())
        return scores | {name: float(net(drawn, pixels).mean()) for name, net in self._distances.items()}


def _through(model: MoVQGAN, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and drawn pixels of one picture [1, C, H, W] or clip [1, T, C, H, W]."""
    if pixels.ndim == 4:
        codes = model.encode(pixels)
        return codes, model.decode(codes)
    codes = model.encode_chunks(pixels)
    return codes, model.decode_chunks(codes)


def save_grid(pairs: Sequence[Shown], path: Path) -> None:
    """A PNG of rows of originals, each with the row of their reconstructions below."""
    height, width = pairs[0][0].shape[:2]
    columns = min(GRID_COLUMNS, len(pairs))
    rows = -(-len(pairs) // columns)
    grid = np.full((rows * (2 * height + LINE), columns * width, 3), 255, np.uint8)
    for index, pair in enumerate(pairs):
        row, column = divmod(index, columns)
        for half, picture in enumerate(pair):
            top = row * (2 * height + LINE) + half * height
            grid[top : top + height, column * width : (column + 1) * width] = picture
    with replacing(path) as temporary:
        Image.fromarray(grid).save(temporary, format="PNG")

"""How well vision tokenizers reconstruct: `python -m tokenizer_train.vision.evaluate`.

Every tokenizer sees the same pictures and clips at the same sizes: ours, BAAI's and transformers' folders alike, so
that published models stand beside ours, and beside them bicubic reduction by the same factor and JPEG at the bits of
the codes. A table, report.json and a grid of pictures for each size go to the output folder.

What a training evaluates on the way is in validation.py.
Shapes: B samples, T frames, C colour channels, H W pixels, K codes.
"""

import importlib.metadata
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from megatron_ext.config import BadSamples, InputError, as_dict, load, run_program
from megatron_ext.config.runtime import DeviceName, RuntimeConfig
from megatron_ext.config.section import Count, Name, Number, Section, Share
from megatron_ext.files import check_folder, replacing, writing
from megatron_ext.media import MediaError, ResizeConfig, Sample, decode_clip, decode_picture, list_samples, resize
from megatron_ext.media.decode import ClipConfig
from megatron_ext.observe.progress import progress
from megatron_ext.runtime.arithmetic import full_fp32
from megatron_ext.runtime.device import PRECISIONS, choose_device, set_threads
from tokenizer_train.vision.codecs import Bicubic, Codec, Jpeg, TokenizerCodec
from tokenizer_train.vision.perceptual import EfficientNetLite0, efficientnet_lite0, lpips_vgg16
from tokenizer_train.vision.quality import FeatureStatistics
from tokenizer_train.vision.scores import Networks, Scores, save_comparison, score_table


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Section):
    """Evaluate vision tokenizers on the same pictures and clips."""

    inputs: list[Name]
    """Folders in the layout of img2dataset's "files" output, and WebDataset tars."""

    tokenizers: list[Name]
    """Folders of vision tokenizers, or NAME=FOLDER: ours, BAAI's, transformers' Emu3VQVAE, or of whole Emu3 models."""

    output: Name
    """Folder for report.json and the grids."""

    sizes: list[Count] = field(default_factory=lambda: [256])
    """Sides in pixels of the centred squares that are compared, one after the other."""

    limit: Number = 0
    """Pictures, and clips, at most; 0 takes all."""

    batch_size: Count = 4
    """Pictures coded at once."""

    clips: ClipConfig = field(default_factory=ClipConfig)
    """Which frames of clips are coded."""

    clip_mode: Literal["chunks", "stream"] = "chunks"
    """chunks: each temporal_downsample_factor frames on their own, as clips are tokenized; stream: the causal network
    over the whole clip."""

    references: bool = True
    """Whether bicubic reduction and JPEG at equal bits stand beside the tokenizers."""

    perceptual: Literal["efficientnet_lite0", "lpips_vgg16", "none"] = "efficientnet_lite0"
    """Network of the perceptual distance; lpips_vgg16 is LPIPS and needs its two files."""

    vgg16_weights: Name | None = None
    """VGG16 weights in torchvision's names, for lpips_vgg16."""

    lpips_heads: Name | None = None
    """Heads in the names of the lpips package, for lpips_vgg16."""

    frechet: Literal["efficientnet_lite0", "none"] = "efficientnet_lite0"
    """Network of the Frechet distance between originals and reconstructions: pooled features of 1,280 numbers. It is
    not Inception, and its numbers compare only with one another; below some thousand frames they are biased upwards."""

    grid_samples: Number = 8
    """Pictures, and clips by their first frame, in the grid of a size."""

    device: DeviceName = "auto"
    """Where to compute; auto takes CUDA when a GPU is visible."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the tokenizers' weights and maps."""

    num_threads: Number = 0
    """CPU threads; 0 takes all cores this process may use."""

    max_bad_fraction: Share = 0.01
    """Largest share of the samples that may be unusable; they are skipped, more of them stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("inputs", "tokenizers", "sizes"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty: give at least one")
        if self.perceptual == "lpips_vgg16" and not (self.vgg16_weights and self.lpips_heads):
            raise InputError("perceptual lpips_vgg16 needs vgg16_weights and lpips_heads: give both files")


class Evaluation:
    """Tokenizers, references and judging networks of one run of the program."""

    def __init__(self, config: EvaluateConfig, console: Console) -> None:
        self.config = config
        self.console = console
        runtime = RuntimeConfig(device=config.device, num_threads=config.num_threads)
        self.device = choose_device(runtime, 0)
        set_threads(runtime, self.device, local_world_size=1)
        self.tokenizers = _load_tokenizers(config, self.device)
        self.codecs = [*self.tokenizers, *(_references(self.tokenizers) if config.references else [])]
        self.networks = _networks(config, self.device)
        samples = list_samples(config.inputs)
        limit = config.limit or len(samples)
        self.samples = {kind: [s for s in samples if s.kind == kind][:limit] for kind in ("image", "video")}
        self.bad = BadSamples(config.max_bad_fraction)
        self._unusable: set[str] = set()
        """Keys of those in `bad`: every size meets them again."""
        shapes = [codec.model.config for codec in self.tokenizers]
        self._multiple = math.lcm(*(shape.temporal_downsample_factor for shape in shapes))
        factor = math.lcm(*(shape.spatial_factor for shape in shapes))
        for size in config.sizes:
            if size < factor or size % factor:
                raise InputError(f"sizes = {config.sizes}: {size} must be a multiple of {factor}, the spatial factor")

    def run(self) -> list[dict[str, Any]]:
        """Rows of all sizes; the grids are written on the way."""
        rows = []
        for codec in self.tokenizers:  # libraries are loaded and buffers made before the clock runs
            codec(np.zeros((1, 1, 64, 64, 3), np.uint8), is_clip=False)
        for size in self.config.sizes:
            shown: list[np.ndarray] = []
            decoded: dict[str, list[np.ndarray]] = {codec.name: [] for codec in self.codecs}
            for kind, samples in self.samples.items():
                if samples:
                    rows += self._run_kind(kind, size, shown, decoded)
            if shown:
                save_comparison(shown, decoded, Path(self.config.output) / f"grid_{size}.png")
        if not rows:
            raise InputError(f"inputs = {self.config.inputs}: nothing in them can be used")
        return rows

    def _run_kind(
        self, kind: str, size: int, shown: list[np.ndarray], decoded: dict[str, list[np.ndarray]]
    ) -> list[dict[str, Any]]:
        """Rows of the pictures, or of the clips, of one size; the first ones go into `shown` and `decoded`."""
        scores = [Scores(codec=codec, kind=kind, size=size, networks=self.networks) for codec in self.codecs]
        originals = FeatureStatistics()
        room = self.config.grid_samples
        with progress(f"{kind} {size}", len(self.samples[kind]), "samples", self.console) as advance:
            for count, frames_BTHWC in self._batches(kind, size):
                if frames_BTHWC is not None:
                    flat_NHWC = frames_BTHWC.reshape(-1, *frames_BTHWC.shape[2:])
                    if (features_ND := self.networks.features_of(flat_NHWC)) is not None:
                        originals.add(features_ND)
                    shown += list(frames_BTHWC[:room, 0])
                    for score in scores:
                        coded = score.codec(frames_BTHWC, is_clip=kind == "video")
                        score.add(frames_BTHWC, coded)
                        decoded[score.codec.name] += list(coded.decoded_BTHWC[:room, 0])
                    room -= min(room, len(frames_BTHWC))
                advance(count)
        return [score.row(originals) for score in scores if score.samples]

    def _batches(self, kind: str, size: int) -> Iterator[tuple[int, np.ndarray | None]]:
        """(samples taken, their frames [B, T, H, W, C] or None): pictures by batch_size, clips one by one."""
        at_once = self.config.batch_size if kind == "image" else 1
        samples = self.samples[kind]
        for first in range(0, len(samples), at_once):
            part = samples[first : first + at_once]
            frames = [found for sample in part if (found := self._frames(sample, size)) is not None]
            yield len(part), np.stack(frames) if frames else None

    def _frames(self, sample: Sample, size: int) -> np.ndarray | None:
        """Uint8 [T, H, W, C] of the centred square; None, and a note, where the sample cannot be used."""
        if sample.key in self._unusable:
            return None

        def square(picture_HWC: np.ndarray) -> np.ndarray:
            return resize(picture_HWC, ResizeConfig(rule="square", size=size), factor=1)

        try:
            data = sample.media.read()
            if sample.kind == "image":
                return square(decode_picture(data))[None]
            clips = self.config.clips
            return decode_clip(
                data,
                frame_rate=clips.frame_rate,
                max_frames=clips.max_frames,
                multiple=self._multiple,
                resize=square,
            ).frames_THWC
        except MediaError as error:
            self._unusable.add(sample.key)
            self.bad.add(sample.source, str(error))
            self.bad.check(sum(map(len, self.samples.values())))
            return None


def _load_tokenizers(config: EvaluateConfig, device: torch.device) -> list[TokenizerCodec]:
    from megatron_ext.hf import load_any_vision_tokenizer  # brings megatron-core, which a training does without

    codecs: dict[str, TokenizerCodec] = {}
    for given in config.tokenizers:
        name, _, folder = given.rpartition("=")
        name = name or Path(folder).resolve().name
        if name in codecs:
            raise InputError(f"tokenizers = {config.tokenizers}: two are called {name!r}; give NAME=FOLDER")
        model = load_any_vision_tokenizer(folder)
        codecs[name] = TokenizerCodec(name, model, device, PRECISIONS[config.precision], config.clip_mode)
    return list(codecs.values())


def _references(tokenizers: Sequence[TokenizerCodec]) -> list[Codec]:
    """Bicubic for every spatial factor, JPEG for every number of bits."""
    factors = sorted({codec.model.config.spatial_factor for codec in tokenizers})
    budgets = {jpeg.budget: jpeg for jpeg in map(Jpeg, reversed(tokenizers))}
    return [*map(Bicubic, factors), *reversed(budgets.values())]


def _networks(config: EvaluateConfig, device: torch.device) -> Networks:
    perceptual = None
    if config.perceptual == "lpips_vgg16":
        perceptual = lpips_vgg16(config.vgg16_weights, config.lpips_heads).to(device)
    elif config.perceptual == "efficientnet_lite0":
        perceptual = efficientnet_lite0().to(device)
    features = EfficientNetLite0.pretrained().to(device).pooled if config.frechet != "none" else None
    return Networks(
        perceptual_name=config.perceptual if perceptual else None,
        perceptual=perceptual,
        features_name=config.frechet if features else None,
        features=features,
        device=device,
    )


def main(argv: list[str]) -> None:
    """Run the program with the arguments after its name."""
    config = load(EvaluateConfig, argv, prog="tokenizer_train.vision.evaluate")
    console = Console(highlight=False)
    output = Path(config.output)
    with writing(output, "output"):
        output.mkdir(parents=True, exist_ok=True)
    check_folder(output, "output")
    evaluation = Evaluation(config, console)
    with full_fp32():
        rows = evaluation.run()
    report = {
        "config": as_dict(config), "device": evaluation.device.type, "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "pillow", "av")},
        "skipped": evaluation.bad.samples, "rows": rows,
    }  # fmt: skip
    with writing(output, "output"), replacing(output / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    wide = console if console.is_terminal else Console(highlight=False, width=200)
    wide.print(score_table(rows, evaluation.networks))
    for line in evaluation.bad.lines():
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"{output}: report.json, grid_SIZE.png", soft_wrap=True)


def cli() -> None:
    """Entry of the console script."""
    run_program(main)


if __name__ == "__main__":
    run_program(main)

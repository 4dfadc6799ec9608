"""Draw pictures and clips for captions, or write captions for pictures, with a trained decoder.

python tools/generate.py --task draw --hf DIR --caption '["a red fox"]' --grid 16*16 --output DIR
python tools/generate.py --task caption --checkpoint RUN_DIR --vision_tokenizer DIR --image '[fox.jpg]' --output DIR
"""

import contextlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from PIL import Image as Picture
from rich.console import Console

from megatron_ext.config import InputError, load, run_program
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.config.section import Bound, Count, Name, NonNegative, Number, Positive, Section, Seed, Share, above
from megatron_ext.files import check_folder, files_named, replacing, text_of, writing
from megatron_ext.media import MediaError, ResizeConfig, decode_picture, resize
from megatron_ext.observe.progress import progress
from megatron_ext.vocab import Grid, Image, Segment, Text, Video, VocabLayout, Vocabulary
from megatron_ext.vocab.grammar import Grammar

if TYPE_CHECKING:
    from megatron_ext.generate import Prompt, TextDecoder
    from megatron_ext.vision import MoVQGAN

EMU3_AREA = 720 * 720
"""Pixels of a picture that Emu3-Gen draws (E3 image_generation.py, image_area)."""

GRID = Bound(
    "height*width in codes, such as 16*16", lambda value: re.fullmatch(r"[1-9]\d*\*[1-9]\d*", value) is not None
)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Section):
    """Draw pictures and clips for captions, or write captions for pictures."""

    task: Literal["draw", "caption"]
    """draw: captions to pictures or clips; caption: pictures to text."""

    output: Name
    """Folder for the pictures and results.json."""

    hf: Name | None = None
    """Hugging Face folder with decoder and vision tokenizer; give this or checkpoint."""

    checkpoint: Name | None = None
    """A step_XXXXXXXX folder, or a run folder, whose newest is taken; needs vision_tokenizer."""

    vision_tokenizer: Name | None = None
    """Folder of the vision tokenizer; empty takes the Hugging Face folder's."""

    caption: tuple[str, ...] = ()
    """Captions to draw."""

    captions_file: Name | None = None
    """Text file, or glob pattern of some, with one caption to draw per line, after those of `caption`."""

    negative_prompt: str = ""
    """What guidance moves away from: stands in the caption's place in the second sequence."""

    grid: Annotated[str, GRID] | None = None
    """Height*width of the picture in codes; empty: a square of 720x720 pixels, as Emu3-Gen."""

    frames: Count | None = None
    """Frames of codes; empty draws a picture, a number a clip."""

    frame_rate: Positive = 8.0
    """Frames per second of a drawn clip."""

    image: tuple[Name, ...] = ()
    """List of picture files to caption, or glob patterns of some."""

    resize: ResizeConfig = field(default_factory=ResizeConfig)
    """Size to which pictures to caption are brought; the data's own serves best."""

    max_text_ids: Count = 256
    """Longest caption, in ids."""

    guidance_scale: NonNegative = 3.0
    """Weight of the caption against the negative prompt when drawing; 1 turns guidance off and halves the work."""

    temperature: NonNegative | None = None
    """Divides the logits; 0 takes the likeliest id. Empty: 1 when drawing, 0 for captions."""

    top_k: Number = 2048
    """Only the likeliest this many ids may be drawn; 0 turns it off."""

    top_p: Annotated[Share, above(0)] = 1.0
    """Only the likeliest ids that together reach this probability may be drawn."""

    keep_codes: bool = False
    """Write the codes of each drawing beside it, as NUMBER.codes.npy: [height, width] of a picture, [frames, height,
    width] of a clip."""

    seed: Seed = 0
    """Same seed, same result, whatever the batch size."""

    batch_size: Count = 8
    """Samples generated at once."""

    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Device, precision and process limits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.hf is None) == (self.checkpoint is None):
            raise InputError("give either hf or checkpoint: where the decoder is")
        if self.checkpoint and not self.vision_tokenizer:
            raise InputError("vision_tokenizer is empty: a checkpoint has none, give its folder")
        if self.task == "draw" and not (self.caption or self.captions_file):
            raise InputError("task draw needs caption or captions_file")
        if self.task == "caption" and not self.image:
            raise InputError("task caption needs image")


@dataclass(frozen=True, kw_only=True)
class Models:
    """What generation needs, on its device."""

    decoder: "TextDecoder"
    vision: "MoVQGAN"
    vocab: Vocabulary


@contextlib.contextmanager
def open_models(config: GenerateConfig) -> Iterator[Models]:
    """Decoder, vision tokenizer and vocabulary, from a Hugging Face folder or a checkpoint."""
    # Imported here, so that --help answers at once.
    from megatron_ext.checkpoint.open import open_checkpoint
    from megatron_ext.config.parallel import ParallelConfig
    from megatron_ext.generate import TextDecoder
    from megatron_ext.hf import load_vision_from_hf, read_vocabulary
    from megatron_ext.runtime import Topology
    from megatron_ext.vision import load_vision_tokenizer

    with Topology.start(config.runtime, ParallelConfig()) as topology:
        target = {"dtype": topology.dtype, "device": topology.device}
        if config.vision_tokenizer is not None:
            vision = load_vision_tokenizer(config.vision_tokenizer)
        else:
            vision = load_vision_from_hf(config.hf)
        if config.hf is not None:
            vocab = read_vocabulary(config.hf)
            decoder = TextDecoder.from_hf(config.hf, **target)
        else:
            opened = open_checkpoint(config.checkpoint, topology)
            opened.check_vision_tokenizer(vision.identity, vision.config.codebook_size)
            vocab = opened.vocab
            decoder = TextDecoder.from_checkpoint(opened.model, **target)
        if vision.config.codebook_size != vocab.layout.codebook_size:
            raise InputError(
                f"the vision tokenizer has {vision.config.codebook_size} codes, the vocabulary "
                f"{vocab.layout.codebook_size}: give the vision tokenizer of the decoder's data"
            )
        yield Models(decoder=decoder, vision=vision.to(topology.device), vocab=vocab)


def run_prompts(config: GenerateConfig, models: Models, prompts: Sequence["Prompt"]) -> Iterator[Segment]:
    """What was generated for each prompt, batch by batch."""
    from megatron_ext.generate import SamplingConfig, document_of, generate

    temperature = config.temperature
    if temperature is None:
        temperature = 1.0 if config.task == "draw" else 0.0
    sampling = SamplingConfig(
        temperature=temperature, top_k=config.top_k, top_p=config.top_p, guidance_scale=config.guidance_scale
    )
    grammar = Grammar(models.vocab)
    # A caption may end early: its total is an upper bound, made up at the end of each batch.
    with progress(config.task, sum(prompt.max_new_ids for prompt in prompts), "ids", Console()) as advance:
        for start in range(0, len(prompts), config.batch_size):
            batch = prompts[start : start + config.batch_size]
            drawn = generate(models.decoder, grammar, batch, sampling, seed=config.seed, on_step=advance)
            advance(sum(prompt.max_new_ids for prompt in batch) - sum(map(len, drawn)))
            for prompt, new_ids in zip(batch, drawn, strict=True):
                yield document_of(prompt, new_ids, models.vocab)[-1]


def draw(config: GenerateConfig, models: Models) -> list[dict[str, Any]]:
    """Write a PNG per caption, for clips a GIF; returns the entries of results.json."""
    from megatron_ext.generate import drawing_prompt

    captions = captions_of(config)
    grid = _grid(config, models)
    prompts = [
        drawing_prompt(caption, grid, models.vocab, negative_prompt=config.negative_prompt, sample=number)
        for number, caption in enumerate(captions)
    ]
    results = []
    for number, (caption, segment) in enumerate(zip(captions, run_prompts(config, models, prompts), strict=True)):
        path = Path(config.output) / f"{number:05d}"
        file = _write_picture(path, segment, models.vision)
        if config.keep_codes:
            _write_codes(path.with_suffix(".codes.npy"), segment)
        results.append({"caption": caption, "file": file, "grid": grid.meta, "seed": config.seed, "sample": number})
    return results


def write_captions(config: GenerateConfig, models: Models) -> list[dict[str, Any]]:
    """Describe each picture; returns the entries of results.json."""
    from megatron_ext.generate import captioning_prompt

    files = pictures_of(config)
    prompts = []
    for number, file in enumerate(files):
        codes_HW = _encode(file, config, models)
        prompts.append(captioning_prompt(Image(codes_HW), models.vocab, max_new_ids=config.max_text_ids, sample=number))
    segments = run_prompts(config, models, prompts)
    return [
        {"file": file, "caption": models.vocab.text.decode(segment.ids) if isinstance(segment, Text) else ""}
        for file, segment in zip(files, segments, strict=True)
    ]


def _encode(file: str, config: GenerateConfig, models: Models) -> np.ndarray:
    """Codes [H, W] of a picture file."""
    from megatron_ext.vision import from_uint8

    try:
        pixels_HWC = resize(decode_picture(Path(file).read_bytes()), config.resize, models.vision.config.spatial_factor)
    except (OSError, MediaError) as error:
        raise InputError(f"image {file!r}: {error}") from None
    device = models.vision.quantize.embedding.weight.device
    return models.vision.encode(from_uint8(pixels_HWC)[None].to(device))[0].cpu().numpy()


def _write_picture(path: Path, segment: Segment, vision: "MoVQGAN") -> str:
    """Decode a drawn picture or clip and write it under `path` plus a suffix. Returns the file's name."""
    import torch

    from megatron_ext.vision import to_uint8

    device = vision.quantize.embedding.weight.device
    if isinstance(segment, Video):
        frames_THWC = to_uint8(vision.decode_chunks(torch.from_numpy(segment.codes_THW)[None].long().to(device))[0])
        first, *others = [Picture.fromarray(frame_HWC) for frame_HWC in frames_THWC]
        options = {"save_all": True, "append_images": others, "duration": 1_000_000 / segment.frame_rate_mhz, "loop": 0}
        file, kind = path.with_suffix(".gif"), "GIF"
    else:
        pixels_CHW = vision.decode(torch.from_numpy(segment.codes_HW)[None].long().to(device))[0]
        first = Picture.fromarray(to_uint8(pixels_CHW))
        options, file, kind = {}, path.with_suffix(".png"), "PNG"
    with writing(file, "output"), replacing(file) as temporary:
        first.save(temporary, format=kind, **options)
    return file.name


def _write_codes(path: Path, segment: Segment) -> None:
    codes = segment.codes_THW if isinstance(segment, Video) else segment.codes_HW
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, codes)


def captions_of(config: GenerateConfig) -> list[str]:
    """The captions to draw. Raises InputError: a file that is missing, or not UTF-8."""
    lines = []
    for file in files_named(config.captions_file, "captions_file") if config.captions_file is not None else []:
        try:
            lines += text_of(file.read_bytes()).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"captions_file {str(file)!r}: {error}") from None
    return [*config.caption, *(line.strip() for line in lines if line.strip())]


def pictures_of(config: GenerateConfig) -> list[str]:
    """The picture files to caption. Raises InputError: one that is missing."""
    return [str(file) for pattern in config.image for file in files_named(pattern, "image")]


def _grid(config: GenerateConfig, models: Models) -> Grid:
    """The grid to draw, as the configuration or Emu3's picture area says."""
    factor = models.vision.config.spatial_factor
    if config.grid is None:
        if models.vocab.layout.size not in (VocabLayout.emu3().size, VocabLayout.emu3_5().size):
            raise InputError("grid is empty: a custom vocabulary has no usual size, give height*width such as 16*16")
        height = width = round(EMU3_AREA**0.5 / factor)
    else:
        height, width = map(int, config.grid.split("*"))
    if config.frames is None:
        return Grid(1, height, width)
    seconds = config.frames * models.vision.config.temporal_downsample_factor / config.frame_rate
    return Grid(config.frames, height, width, round(1000 * config.frame_rate), round(1000 * seconds))


def main(argv: list[str]) -> None:
    """Generate what `argv` asks for."""
    config = load(GenerateConfig, argv, prog="generate.py")
    output = Path(config.output)
    with writing(output, "output"):
        output.mkdir(parents=True, exist_ok=True)
    check_folder(output, "output")
    with open_models(config) as models:
        started = time.monotonic()
        results = draw(config, models) if config.task == "draw" else write_captions(config, models)
    with writing(output, "output"), replacing(output / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for result in results:
        print(f"{result['file']}: {result['caption']}")
    print(f"wrote {len(results)} results to {output} in {time.monotonic() - started:.1f} s")


def cli() -> None:
    """Console script emu3-generate."""
    run_program(main)


if __name__ == "__main__":
    cli()

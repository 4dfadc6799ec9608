"""Pictures and clips to visual codes: folders or WebDataset tars in, tar shards of codes and a manifest out.

What cannot be decoded is skipped, counted and named; too much of it stops the program. Started again, it takes up where
it was interrupted, and does nothing when inputs, tokenizer and options are as they were; when they are not, it refuses
or, if told so, overwrites.
"""

import functools
import hashlib
import json
import time
from dataclasses import dataclass, field

from rich.console import Console

from megatron_ext.config import BadSamples, InputError, as_dict, load, run_program
from megatron_ext.config.runtime import DeviceName, RuntimeConfig
from megatron_ext.media import ResizeConfig, Sample, list_samples
from megatron_ext.observe.progress import progress
from megatron_ext.runtime.device import choose_device
from megatron_ext.vision import MoVQGAN, load_vision_tokenizer
from megatron_ext.vision.shards import ShardWriter
from megatron_ext.vision.tokenize import ClipConfig, decode_sample, tokenize


@dataclass(frozen=True, kw_only=True)
class TokenizeVisionConfig:
    """Tokenize pictures and clips: folders or WebDataset tars in, tar shards of codes and a manifest out."""

    inputs: list[str]
    """Folders in the layout of img2dataset's "files" output, and WebDataset tars."""

    tokenizer: str
    """Folder of the vision tokenizer (config.json, model.safetensors)."""

    output: str
    """Folder for the shards and manifest.json."""

    resize: ResizeConfig = field(default_factory=ResizeConfig)
    """Size at which pictures and frames are encoded."""

    clips: ClipConfig = field(default_factory=ClipConfig)
    """Which frames of clips are encoded."""

    batch_size: int = 8
    """Pictures, or clips, of equal size encoded at once."""

    shard_size: int = 1000
    """Input samples of one shard; an interruption loses at most this much work."""

    max_bad_fraction: float = 0.01
    """Largest share of the samples that may be unusable (undecodable, unreadable captions); more of them stop."""

    overwrite: bool = False
    """Remove what output holds when it was made with other inputs, options or tokenizer; false refuses."""

    device: DeviceName = "auto"
    """Where to compute; auto takes CUDA when a GPU is visible."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise InputError("inputs is empty: give folders or tars of media")
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: must be positive")


def manifest_header(config: TokenizeVisionConfig, samples: list[Sample], model: MoVQGAN) -> dict:
    """What shapes the codes and their order; equal headers mean that finished shards can stay."""
    listing = [
        (
            sample.key,
            sample.kind,
            *((part.size, part.stamp) for part in (sample.media, sample.text, sample.fields) if part),
        )
        for sample in samples
    ]
    return {
        "vision_tokenizer": model.identity,
        "codebook_size": model.config.codebook_size,
        "spatial_factor": model.config.spatial_factor,
        "temporal_factor": model.config.temporal_downsample_factor,
        "resize": as_dict(config.resize),
        "clips": as_dict(config.clips),
        "shard_size": config.shard_size,
        "inputs_sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
    }


def main(argv: list[str]) -> None:
    """Run the program with the arguments after its name."""
    config = load(TokenizeVisionConfig, argv, prog="tokenize_vision")
    console = Console(highlight=False)
    bad = BadSamples(config.max_bad_fraction)
    samples = list_samples(config.inputs)
    model = load_vision_tokenizer(config.tokenizer).to(choose_device(RuntimeConfig(device=config.device), 0))
    factor = model.config.spatial_factor
    if config.resize.rule == "square" and config.resize.size % factor:
        raise InputError(f"resize.size = {config.resize.size}: must be a multiple of the spatial factor {factor}")
    writer = ShardWriter(config.output, manifest_header(config, samples, model), overwrite=config.overwrite)
    for item in writer.manifest["skipped"]:
        bad.add(item["source"], item["reason"])
    bad.check(len(samples))
    if writer.complete:
        console.print(f"{config.output} is finished and nothing has changed: reused", soft_wrap=True)
    else:
        _tokenize_all(config, samples, model, writer, bad, console)
    _report(config, writer, bad, console)


def _tokenize_all(
    config: TokenizeVisionConfig,
    samples: list[Sample],
    model: MoVQGAN,
    writer: ShardWriter,
    bad: BadSamples,
    console: Console,
) -> None:
    decode = functools.partial(decode_sample, model=model, resizing=config.resize, clips=config.clips)
    done, start = writer.inputs_done, time.monotonic()
    if done:
        console.print(f"{config.output}: {done} of {len(samples)} samples were done before, going on", soft_wrap=True)
    with progress("tokenize", len(samples) - done, "samples", console) as advance:
        for first in range(done, len(samples), config.shard_size):
            block = samples[first : first + config.shard_size]
            tokenized, skipped = tokenize(block, model, decode, batch_size=config.batch_size, advance=advance)
            for item in skipped:
                bad.add(item["source"], item["reason"])
            bad.check(len(samples))  # the shards before this one stay: with a larger fraction the work goes on
            writer.write(tokenized, skipped, len(block))
    writer.finish()
    console.print(f"tokenized {len(samples) - done} samples in {time.monotonic() - start:.1f} s", soft_wrap=True)


def _report(config: TokenizeVisionConfig, writer: ShardWriter, bad: BadSamples, console: Console) -> None:
    manifest = writer.manifest
    console.print(
        f"{config.output}: {manifest['samples']['image']} pictures, {manifest['samples']['video']} clips in "
        f"{len(manifest['shards'])} shards, vision tokenizer {manifest['vision_tokenizer']}",
        soft_wrap=True,
    )
    for line in bad.lines():
        console.print(line, markup=False, soft_wrap=True)
    if not manifest["shards"]:
        raise InputError(f"none of the {len(manifest['skipped'])} samples of {config.inputs} could be used")


def cli() -> None:
    """Entry of the console script."""
    run_program(main)


if __name__ == "__main__":
    run_program(main)

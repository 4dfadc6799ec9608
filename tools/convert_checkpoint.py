"""Convert between our checkpoints and Hugging Face folders, in one process.

python tools/convert_checkpoint.py to-hf --checkpoint RUN_DIR --vision_tokenizer DIR --output DIR
python tools/convert_checkpoint.py from-hf --hf DIR --output DIR
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ext.config import InputError, load, run_program, to_yaml

DIRECTIONS = ("to-hf", "from-hf")


@dataclass(frozen=True, kw_only=True)
class ToHfConfig:
    """Export a decoder checkpoint and its vision tokenizer as a folder that transformers loads."""

    checkpoint: str
    """A step_XXXXXXXX folder; or a run folder or its checkpoints folder, whose newest is taken."""

    vision_tokenizer: str
    """Folder of the vision tokenizer that the data was made with."""

    output: str
    """Hugging Face folder to write; an earlier export there is replaced."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the decoder's weights; the vision tokenizer stays in float32."""


@dataclass(frozen=True, kw_only=True)
class FromHfConfig:
    """Import a Hugging Face Emu3 folder as a checkpoint to start a run from."""

    hf: str
    """Folder in the layout of Emu3ForConditionalGeneration, of Emu3ForCausalLM, or BAAI's own."""

    output: str
    """Folder to write: a checkpoint for checkpoint.init_from, and vision_tokenizer/ where the source has one."""


def to_hf(config: ToHfConfig) -> None:
    """Export."""
    import torch

    from megatron_ext.checkpoint.open import open_checkpoint
    from megatron_ext.config.parallel import ParallelConfig
    from megatron_ext.config.runtime import RuntimeConfig
    from megatron_ext.hf.release import write_release
    from megatron_ext.runtime import Topology
    from megatron_ext.vision import load_vision_tokenizer

    vision = load_vision_tokenizer(config.vision_tokenizer)
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        opened = open_checkpoint(config.checkpoint, topology)
        opened.check_vision_tokenizer(vision.identity, vision.config.codebook_size)
        write_release(
            config.output,
            opened.model,
            vision,
            opened.vocab,
            max_position_embeddings=opened.seq_length,
            dtype=getattr(torch, config.dtype),
        )
    print(f"wrote {config.output}")


def from_hf(config: FromHfConfig) -> None:
    """Import."""
    from megatron_ext.checkpoint.decoder import save_weights
    from megatron_ext.config.parallel import ParallelConfig
    from megatron_ext.config.runtime import RuntimeConfig
    from megatron_ext.hf import (
        decoder_shape,
        load_decoder_weights,
        load_vision_from_hf,
        model_section,
        read_config,
        read_vocabulary,
    )
    from megatron_ext.model import build_model
    from megatron_ext.runtime import Topology
    from megatron_ext.vision import save_vision_tokenizer

    theirs = read_config(config.hf)
    section = model_section(decoder_shape(theirs))
    vocab = read_vocabulary(config.hf)
    seq_length = theirs.get("text_config", theirs)["max_position_embeddings"]
    # The part of a run's configuration that opens the checkpoint.
    config_yaml = "model:\n" + _indented(to_yaml(section)) + f"train:\n  seq_length: {seq_length}\n"
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        model = build_model(section, ParallelConfig(), vocab.layout, topology, seed=0)
        load_decoder_weights(config.hf, model, topology)
        folder = save_weights(Path(config.output), model, topology, vocab, config_yaml)
    print(f"wrote {folder}")
    if "vq_config" in theirs:
        save_vision_tokenizer(load_vision_from_hf(config.hf), Path(config.output) / "vision_tokenizer")
        print(f"wrote {Path(config.output) / 'vision_tokenizer'}")


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


def main(argv: list[str]) -> None:
    """Convert in the direction that the first argument names."""
    direction, *rest = argv or [""]
    prog = f"convert_checkpoint.py {direction}"
    if direction == "to-hf":
        to_hf(load(ToHfConfig, rest, prog=prog))
    elif direction == "from-hf":
        from_hf(load(FromHfConfig, rest, prog=prog))
    elif direction in ("-h", "--help"):
        print(f"{__doc__}\n{' and '.join(DIRECTIONS)} have a --help of their own.")
    else:
        raise InputError(f"direction {direction!r}: must be one of {', '.join(DIRECTIONS)}")


def cli() -> None:
    """Console script emu3-convert-checkpoint."""
    run_program(main)


if __name__ == "__main__":
    cli()

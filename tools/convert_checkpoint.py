"""Convert between our checkpoints and Hugging Face folders, in one process and a few gigabytes of memory.

python tools/convert_checkpoint.py to-hf --checkpoint RUN_DIR --vision_tokenizer DIR --output DIR
python tools/convert_checkpoint.py from-hf --hf DIR --output DIR
python tools/convert_checkpoint.py check --hf DIR
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ext.config import InputError, as_dict, load, run_program, to_yaml
from megatron_ext.config.section import Count, Name, Section
from megatron_ext.files import check_folder, writing

DIRECTIONS = ("to-hf", "from-hf", "check")


@dataclass(frozen=True, kw_only=True)
class ToHfConfig(Section):
    """Release a decoder checkpoint and its vision tokenizer as a Hugging Face folder."""

    checkpoint: Name
    """A step_XXXXXXXX folder; or a run folder or its checkpoints folder, whose newest is taken."""

    output: Name
    """Hugging Face folder to write; an earlier export there is replaced."""

    vision_tokenizer: Name | None = None
    """Folder of the vision tokenizer that the data was made with; only the baai format and QK norm do without."""

    format: Literal["transformers", "baai"] = "transformers"
    """transformers: its own classes; baai: the layout of BAAI's released models, for BAAI's code."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the decoder's weights; the vision tokenizer stays in float32. float32: the master weights of Adam, where
    the checkpoint has them (checkpoint.optimizer_format fully_reshardable)."""

    remote_code_from: Name | None = None
    """Folder with BAAI's Python files, such as a clone of github.com/baaivision/Emu3, to copy into a baai export."""

    image_area: Count = 512 * 512
    """Pixels of the pictures trained on, as a baai export's config.json tells BAAI's code."""

    check: bool = True
    """Load the result in transformers and generate; a large model needs the memory."""


@dataclass(frozen=True, kw_only=True)
class FromHfConfig(Section):
    """Import a Hugging Face Emu3 folder as a checkpoint to start a run from."""

    hf: Name
    """Folder in the layout of Emu3ForConditionalGeneration, Emu3ForCausalLM, Qwen3ForCausalLM, or BAAI's own."""

    output: Name
    """Folder to write: a checkpoint for checkpoint.init_from, and vision_tokenizer/ where the source has one."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the checkpoint's weights."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig(Section):
    """Check a release: every file against SHA256SUMS, then load and generate in transformers alone."""

    hf: Name
    """Folder that to-hf wrote, perhaps copied since."""


def to_hf(config: ToHfConfig) -> None:
    """Export."""
    check_folder(config.output, "output")
    import torch

    from megatron_ext.hf.contents import Source
    from megatron_ext.hf.release import write_release

    notes = write_release(
        config.output,
        Source.of_checkpoint(config.checkpoint, config.vision_tokenizer, exact=config.dtype == "float32"),
        format=config.format,
        dtype=getattr(torch, config.dtype),
        remote_code_from=config.remote_code_from,
        image_area=config.image_area,
    )
    print("\n".join((*notes, f"wrote {config.output}")))
    if config.check:
        check(CheckConfig(hf=config.output))


def from_hf(config: FromHfConfig) -> None:
    """Import."""
    check_folder(config.output, "output")
    import torch

    from megatron_ext.checkpoint.streaming import write_weights
    from megatron_ext.hf import load_vision_from_hf, model_section, read_config, read_decoder, read_vocabulary
    from megatron_ext.hf.convert import VISION_FOLDER
    from megatron_ext.vision import save_vision_tokenizer

    theirs, vocab = read_config(config.hf), read_vocabulary(config.hf)
    decoder = read_decoder(config.hf, vocab.layout)
    section = model_section(decoder.shape)
    # The part of a run's configuration that opens the checkpoint.
    seq_length = theirs.get("text_config", theirs)["max_position_embeddings"]
    config_yaml = to_yaml({"model": as_dict(section), "train": {"seq_length": seq_length}})
    tensors = {name: tensor.to(getattr(torch, config.dtype)) for name, tensor in decoder.tensors.items()}
    identities = {"vocabulary": vocab.identity, "model": decoder.shape.identity}
    print(f"wrote {write_weights(Path(config.output), tensors, vocab, config_yaml, identities)}")
    if "vq_config" in theirs or (Path(config.hf) / VISION_FOLDER).is_dir():
        with writing(config.output, "output"):
            save_vision_tokenizer(load_vision_from_hf(config.hf), Path(config.output) / VISION_FOLDER)
        print(f"wrote {Path(config.output) / VISION_FOLDER}")


def check(config: CheckConfig) -> None:
    """Check, and print what was done."""
    from megatron_ext.hf.release import check_release

    done = check_release(config.hf)
    print(f"checked {config.hf}: " + ", ".join(f"{name} {value}" for name, value in done.items()))


def main(argv: list[str]) -> None:
    """Do what the first argument names."""
    direction, *rest = argv or [""]
    prog = f"convert_checkpoint.py {direction}"
    if direction == "to-hf":
        to_hf(load(ToHfConfig, rest, prog=prog))
    elif direction == "from-hf":
        from_hf(load(FromHfConfig, rest, prog=prog))
    elif direction == "check":
        check(load(CheckConfig, rest, prog=prog))
    elif direction in ("-h", "--help"):
        print(f"{__doc__}\n{', '.join(DIRECTIONS)} have a --help of their own.")
    else:
        raise InputError(f"direction {direction!r}: must be one of {', '.join(DIRECTIONS)}")


def cli() -> None:
    """Console script emu3-convert-checkpoint."""
    run_program(main)


if __name__ == "__main__":
    cli()

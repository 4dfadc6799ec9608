"""Weights between megatron-core's decoder, our vision tokenizer and Hugging Face folders, tensor by tensor.

Shapes need no conversion here: the tables of `decoder` and `vision` do it. This module walks over parameters.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config import InputError
from megatron_ext.config.model import ModelConfig
from megatron_ext.hf.decoder import canonical_name, decoder_table, shape_from_text_config
from megatron_ext.hf.table import Table, UnknownName
from megatron_ext.hf.vision import vision_config, vision_table
from megatron_ext.hf.weights import WeightsReader
from megatron_ext.model import Emu3Model
from megatron_ext.plan import DecoderShape
from megatron_ext.runtime import Topology
from megatron_ext.vision import MoVQGAN
from megatron_ext.vocab import QwenTokenizer, VocabLayout, Vocabulary

TEXT_PREFIX = "text_model."
VISION_PREFIX = "vqmodel."
"""Where `Emu3ForConditionalGeneration` stores its parts (transformers conversion_mapping.py, "emu3")."""

MODEL_TYPES = ("emu3", "emu3_text_model")
"""Emu3ForConditionalGeneration and BAAI's own (which spells it Emu3); Emu3ForCausalLM."""

VOCABULARY = "vocabulary"
"""Sub-folder of an export with what rebuilds our vocabulary; transformers does not read it."""


def is_hf_folder(folder: str | Path) -> bool:
    """Whether `folder` looks like a Hugging Face model rather than one of our checkpoints."""
    return (Path(folder) / "config.json").is_file()


def read_vocabulary(folder: str | Path) -> Vocabulary:
    """The vocabulary of a folder that `write_release` made, or of a published Emu3 model.

    Raises:
        InputError: neither; tokenizer.json alone does not tell which layout it is.
    """
    if (Path(folder) / VOCABULARY).is_dir():
        return Vocabulary.from_folder(Path(folder) / VOCABULARY)
    config = read_config(folder)
    for layout in (VocabLayout.emu3(), VocabLayout.emu3_5()):
        if config.get("text_config", config).get("vocab_size") == layout.size:
            return Vocabulary(layout, QwenTokenizer())
    raise InputError(
        f"{folder}: has no {VOCABULARY}/ folder and not Emu3's number of ids; use one that convert_checkpoint wrote"
    )


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of an Emu3 model folder.

    Raises:
        InputError: no such file, not JSON, or another model type.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give the folder of a Hugging Face model") from None
    if str(config.get("model_type")).lower() not in MODEL_TYPES:
        raise InputError(f"{path}: model_type is {config.get('model_type')!r}, must be one of {', '.join(MODEL_TYPES)}")
    return config


def decoder_shape(config: dict[str, Any]) -> DecoderShape:
    """The decoder that a config.json describes; BAAI's own config.json has the fields at the top."""
    return shape_from_text_config(config.get("text_config", config))


def model_section(shape: DecoderShape) -> ModelConfig:
    """The `model` section that builds this shape.

    Raises:
        InputError: an RMSNorm epsilon that the section cannot express.
    """
    names = set(ModelConfig.__dataclass_fields__) - {"preset"}
    section = ModelConfig(**{name: getattr(shape, name) for name in names})
    built = DecoderShape.of(section)
    if built.layernorm_epsilon != shape.layernorm_epsilon:
        raise InputError(
            f"config.json: rms_norm_eps {shape.layernorm_epsilon} is not Emu3's {built.layernorm_epsilon}; "
            "such a model cannot be loaded"
        )
    return section


def model_table(model: Emu3Model) -> Table:
    """The rules of this model."""
    return decoder_table(model.shape, model.layout.size, model.vocab_size)


def decoder_tensors(model: Emu3Model, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of `Emu3ForCausalLM`'s state dict, one after another, from a model that is not sharded.

    Args:
        dtype: type of the tensors; None keeps the model's.
    """
    ours = ((canonical_name(name), parameter.detach()) for name, parameter in model.named_parameters())
    for name, tensor in model_table(model).to_theirs(ours):
        yield name, tensor if dtype is None else tensor.to(dtype)


def read_decoder_tensors(folder: str | Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of `Emu3ForCausalLM`'s state dict from a folder of any of the layouts, one after another."""
    with WeightsReader(folder) as reader:
        prefix = _text_prefix(reader)
        for name in sorted(reader.names()):
            if name.startswith(prefix) and not name.startswith(VISION_PREFIX):
                tensor = reader[name]
                yield name.removeprefix(prefix), tensor if dtype is None else tensor.to(dtype)


def load_decoder_weights(folder: str | Path, model: Emu3Model, topology: Topology) -> None:
    """Load a Hugging Face folder's decoder into `model` in place; every tensor rank takes its shard.

    Accepts the layouts of `Emu3ForConditionalGeneration`, of `Emu3ForCausalLM`, and BAAI's own.

    Raises:
        InputError: another shape or vocabulary, missing or surplus tensors.
    """
    _check_fits(read_config(folder), model)
    rank, size = topology.tensor_parallel_rank, topology.tensor_parallel_size
    table = model_table(model)
    with WeightsReader(folder) as reader, torch.no_grad():
        prefix = _text_prefix(reader)
        unused = {name for name in reader.names() if not name.startswith(VISION_PREFIX)}
        for name, parameter in model.named_parameters():
            match = table.match_ours(canonical_name(name))
            theirs = [_read(reader, prefix + their) for their in match.theirs]
            tensor = match.rule.to_ours(theirs, rank, size)
            if tensor.shape != parameter.shape:
                raise InputError(
                    f"{folder}: {match.theirs[0]} gives {tuple(tensor.shape)}, {name} is {tuple(parameter.shape)}; "
                    "its tensors and its config.json do not belong together"
                )
            parameter.copy_(tensor)
            unused -= {prefix + their for their in match.theirs}
    if unused:
        raise InputError(f"{folder}: {len(unused)} tensors belong to no part of an Emu3 decoder, such as {min(unused)}")


def vision_tensors(tokenizer: MoVQGAN) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of `Emu3VQVAE`'s state dict."""
    return vision_table().to_theirs(tokenizer.state_dict().items())


def load_vision_from_hf(folder: str | Path) -> MoVQGAN:
    """The vision tokenizer of an `Emu3ForConditionalGeneration` folder.

    Raises:
        InputError: the folder has none, or its tensors do not fit its configuration.
    """
    config = read_config(folder)
    if "vq_config" not in config:
        raise InputError(f"{folder}: config.json has no vq_config: this folder holds no vision tokenizer")
    with WeightsReader(folder) as reader:
        names = [name for name in reader.names() if name.startswith(VISION_PREFIX)]
        theirs = {name.removeprefix(VISION_PREFIX): reader[name] for name in names}
    tokenizer = MoVQGAN(vision_config(config["vq_config"]))
    try:
        tokenizer.load_state_dict(vision_table().to_ours(theirs))
    except (RuntimeError, KeyError, UnknownName) as error:
        raise InputError(f"{folder}: vision tokenizer does not fit: {' '.join(str(error).split())[:300]}") from None
    return tokenizer.eval()


def _text_prefix(reader: WeightsReader) -> str:
    return TEXT_PREFIX if any(name.startswith(TEXT_PREFIX) for name in reader.names()) else ""


def _read(reader: WeightsReader, name: str) -> torch.Tensor:
    try:
        return reader[name]
    except KeyError:
        raise InputError(f"{reader.folder}: tensor {name} is missing; is the download complete?") from None


def _check_fits(config: dict[str, Any], model: Emu3Model) -> None:
    """Raise InputError unless the folder's model has this shape and vocabulary."""
    theirs, layout = decoder_shape(config), model.layout
    for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
                 "kv_channels", "qk_layernorm", "rotary_base", "layernorm_epsilon"):  # fmt: skip
        if getattr(theirs, name) != getattr(model.shape, name):
            raise InputError(
                f"model.{name} is {getattr(model.shape, name)}, the Hugging Face folder's is {getattr(theirs, name)}: "
                "set the model section to the folder's shape"
            )
    text = config.get("text_config", config)
    if text["vocab_size"] != layout.size or text.get("bos_token_id", layout.bos) != layout.bos:
        raise InputError(
            f"vocab.layout {layout.name} has {layout.size} ids and BOS {layout.bos}, the Hugging Face folder has "
            f"{text['vocab_size']} and {text.get('bos_token_id')}: use the vocabulary it was trained with"
        )

"""Hugging Face folders read: configuration, vocabulary, decoder and vision tokenizer, of any of the layouts.

The tables of `decoder` and `vision` say what becomes what. This module walks over parameters, some rows at a time.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.lazy import LazyTensor
from megatron_ext.config import InputError, reason_of
from megatron_ext.config.model import ModelConfig
from megatron_ext.hf.decoder import Decoder, canonical_name, decoder_table, shape_from_text_config, their_shapes
from megatron_ext.hf.table import UnknownName
from megatron_ext.hf.vision import vision_config, vision_table
from megatron_ext.hf.weights import WeightsReader
from megatron_ext.model import Emu3Model
from megatron_ext.plan import DecoderShape, pad_vocabulary
from megatron_ext.runtime import Topology
from megatron_ext.vision import MoVQGAN, load_vision_tokenizer
from megatron_ext.vocab import QwenTokenizer, VocabLayout, Vocabulary

TEXT_PREFIX = "text_model."
VISION_PREFIX = "vqmodel."
"""Where `Emu3ForConditionalGeneration` stores its parts (transformers conversion_mapping.py, "emu3")."""

VISION_MODEL_TYPE = "emu3_vqgan"
"""transformers' `Emu3VQVAE`, stored on its own."""

VISION_FOLDER = "vision_tokenizer"
"""Sub-folder with the vision tokenizer, in BAAI's layout, where the model's own class has no place for one."""

MODEL_TYPES = ("emu3", "emu3_text_model", "qwen3")
"""Emu3ForConditionalGeneration and BAAI's own (which spells it Emu3); Emu3ForCausalLM; Qwen3ForCausalLM (QK norm)."""

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
    config = _read_json(path)
    if str(config.get("model_type")).lower() not in MODEL_TYPES:
        raise InputError(f"{path}: model_type is {config.get('model_type')!r}, must be one of {', '.join(MODEL_TYPES)}")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give the folder of a Hugging Face model") from None


def read_shape(folder: str | Path) -> DecoderShape:
    """The decoder of a folder; BAAI's own config.json has the fields at the top."""
    config = read_config(folder)
    names = WeightsReader(folder).names()
    qk_layernorm = any(name.endswith(".self_attn.q_norm.weight") for name in names)
    return shape_from_text_config(config.get("text_config", config), qk_layernorm=qk_layernorm)


def model_section(shape: DecoderShape) -> ModelConfig:
    """The `model` section that builds this shape.

    Raises:
        InputError: an RMSNorm epsilon that the section cannot express.
    """
    names = {field.name for field in dataclasses.fields(ModelConfig)} - {"preset"}
    section = ModelConfig(**{name: getattr(shape, name) for name in names})
    built = DecoderShape.of(section)
    if built.layernorm_epsilon != shape.layernorm_epsilon:
        raise InputError(
            f"config.json: rms_norm_eps {shape.layernorm_epsilon} is not Emu3's {built.layernorm_epsilon}; "
            "such a model cannot be loaded"
        )
    return section


def decoder_tensors(model: Emu3Model, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of `Emu3ForCausalLM`'s state dict, one after another, from a model that is not sharded.

    Args:
        dtype: type of the tensors; None keeps the model's.
    """
    for name, tensor in Decoder.of(model).theirs(dtype):
        yield name, tensor.whole()


def read_decoder_tensors(folder: str | Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of `Emu3ForCausalLM`'s state dict from a folder of any of the layouts, one after another."""
    reader = WeightsReader(folder)
    prefix = _text_prefix(reader)
    for name in sorted(reader.names()):
        if name.startswith(prefix) and not name.startswith(VISION_PREFIX):
            tensor = reader[name].whole()
            yield name.removeprefix(prefix), tensor if dtype is None else tensor.to(dtype)


def read_decoder(folder: str | Path, layout: VocabLayout) -> Decoder:
    """The decoder of a folder of any of the layouts; its weights stay there until they are asked for.

    Raises:
        InputError: tensors are missing, surplus, or not of the shapes that config.json says.
    """
    shape = read_shape(folder)
    theirs = _their_decoder(folder, shape, layout)
    table = decoder_table(shape, layout.size, pad_vocabulary(layout.size, 1))
    return Decoder(shape=shape, layout=layout, tensors=table.to_ours(theirs))


def load_decoder_weights(folder: str | Path, model: Emu3Model, topology: Topology) -> None:
    """Load a Hugging Face folder's decoder into `model` in place; every tensor rank reads its shard.

    Accepts the layouts of `Emu3ForConditionalGeneration`, `Emu3ForCausalLM`, `Qwen3ForCausalLM`, and BAAI's own.

    Raises:
        InputError: another shape or vocabulary, missing or surplus tensors.
    """
    _check_fits(folder, model)
    theirs = _their_decoder(folder, model.shape, model.layout)
    table = decoder_table(model.shape, model.layout.size, model.vocab_size)
    shards = table.to_ours(theirs, topology.tensor_parallel_rank, topology.tensor_parallel_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = shards[canonical_name(name)]
            for start, stop in tensor.ranges():
                parameter[start:stop] = tensor.read(start, stop)


def _their_decoder(folder: str | Path, shape: DecoderShape, layout: VocabLayout) -> dict[str, LazyTensor]:
    """The folder's decoder by the names of `Emu3ForCausalLM`, complete and of the right shapes."""
    reader = WeightsReader(folder)
    prefix = _text_prefix(reader)
    expected = {prefix + name: size for name, size in their_shapes(shape, layout.size).items()}
    surplus = {name for name in reader.names() if not name.startswith(VISION_PREFIX)} - expected.keys()
    if surplus:
        raise InputError(
            f"{folder}: {len(surplus)} tensors belong to no part of an Emu3 decoder, such as {min(surplus)}"
        )
    for name, size in expected.items():
        if reader[name].shape != size:
            raise InputError(
                f"{folder}: {name} is {reader[name].shape}, config.json says {size}: they do not belong together"
            )
    return {name.removeprefix(prefix): reader[name] for name in expected}


def vision_tensors(tokenizer: MoVQGAN) -> Iterator[tuple[str, LazyTensor]]:
    """(name, tensor) of `Emu3VQVAE`'s state dict."""
    return vision_table().to_theirs((name, LazyTensor.of(tensor)) for name, tensor in tokenizer.state_dict().items())


def load_vision_from_hf(folder: str | Path) -> MoVQGAN:
    """The vision tokenizer of an `Emu3ForConditionalGeneration` folder, or of its sub-folder vision_tokenizer/.

    Raises:
        InputError: the folder has none, or its tensors do not fit its configuration.
    """
    config = read_config(folder)
    if "vq_config" not in config:
        if (Path(folder) / VISION_FOLDER).is_dir():
            return load_vision_tokenizer(Path(folder) / VISION_FOLDER)
        raise InputError(
            f"{folder}: config.json has no vq_config and there is no {VISION_FOLDER}/: this folder holds no vision "
            "tokenizer; give its own folder"
        )
    return _load_vision(folder, config["vq_config"], VISION_PREFIX)


def load_any_vision_tokenizer(folder: str | Path) -> MoVQGAN:
    """The vision tokenizer of a folder of ours, of BAAI's, of transformers' `Emu3VQVAE`, or of a whole Emu3 model.

    Raises:
        InputError: the folder holds none of them.
    """
    model_type = _read_json(Path(folder) / "config.json").get("model_type")
    if model_type == VISION_MODEL_TYPE:
        return _load_vision(folder, _read_json(Path(folder) / "config.json"), "")
    if str(model_type).lower() in MODEL_TYPES:
        return load_vision_from_hf(folder)
    return load_vision_tokenizer(folder)


def _load_vision(folder: str | Path, fields: dict[str, Any], prefix: str) -> MoVQGAN:
    """A tokenizer of transformers' fields, from tensors whose names start with `prefix`."""
    reader = WeightsReader(folder)
    theirs = {name.removeprefix(prefix): reader[name] for name in reader.names() if name.startswith(prefix)}
    tokenizer = MoVQGAN(vision_config(fields))
    try:
        ours = vision_table().to_ours(theirs)
        tokenizer.load_state_dict({name: tensor.whole() for name, tensor in ours.items()})
    except (RuntimeError, KeyError, UnknownName) as error:
        raise InputError(f"{folder}: vision tokenizer does not fit: {reason_of(error)}") from None
    return tokenizer.eval()


def _text_prefix(reader: WeightsReader) -> str:
    return TEXT_PREFIX if any(name.startswith(TEXT_PREFIX) for name in reader.names()) else ""


def _check_fits(folder: str | Path, model: Emu3Model) -> None:
    """Raise InputError unless the folder's model has this shape and vocabulary."""
    config, theirs, layout = read_config(folder), read_shape(folder), model.layout
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

"""transformers' own classes: Emu3ForConditionalGeneration, and Qwen3ForCausalLM for decoders with QK norm."""

import json
from typing import Any

import torch
from transformers import Emu3Config, GenerationConfig, PreTrainedConfig, Qwen3Config

from megatron_ext.config import InputError
from megatron_ext.hf.contents import Contents, Source
from megatron_ext.hf.convert import TEXT_PREFIX, VISION_PREFIX, vision_tensors
from megatron_ext.hf.decoder import text_config
from megatron_ext.hf.tokenizer import build_tokenizer, tokenizer_config
from megatron_ext.hf.vision import vq_config

PROCESSOR_SPATIAL_FACTOR = 8
"""Pixels per code that transformers' Emu3Processor has written into its code (processing_emu3.py, downsample_ratio)."""

# BAAI/Emu3-VisionTokenizer preprocessor_config.json; transformers' class would default to CLIP's mean and deviation.
_PREPROCESSOR = {
    "image_processor_type": "Emu3ImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "min_pixels": 262144,
    "max_pixels": 1048576,
    "spatial_factor": PROCESSOR_SPATIAL_FACTOR,
    "processor_class": "Emu3Processor",
}

_SAMPLING = {"do_sample": True, "top_k": 2048}
"""BAAI's sampling of pictures (E3 image_generation.py:31-56)."""


def transformers_contents(source: Source, dtype: torch.dtype) -> Contents:
    """The folder of transformers' class for this decoder.

    Raises:
        InputError: a vocabulary or vision tokenizer that the class cannot express.
    """
    layout = source.vocabulary.layout
    tokenizer = build_tokenizer(source.vocabulary.text, layout)
    roles = {"bos_token_id": layout.bos, "eos_token_id": layout.eos, "pad_token_id": layout.pad}
    files: dict[str, bytes | dict[str, Any]] = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": tokenizer_config(layout, source.max_position_embeddings),
        "generation_config.json": _plain(GenerationConfig(**roles, **_SAMPLING)),
    }
    text = text_config(source.decoder.shape, layout, source.max_position_embeddings)
    if source.decoder.shape.qk_layernorm:
        return _qwen3(source, dtype, text, files)
    return _emu3(source, dtype, text, files, tokenizer.get_vocab(with_added_tokens=True))


def _emu3(
    source: Source, dtype: torch.dtype, text: dict[str, Any], files: dict[str, Any], vocabulary_map: dict[str, int]
) -> Contents:
    """Emu3ForConditionalGeneration: decoder and vision tokenizer in one model."""
    if source.vision is None:
        raise InputError(
            "vision_tokenizer is empty: transformers' Emu3ForConditionalGeneration holds one; give the folder of the "
            "vision tokenizer that the data was made with"
        )
    config = Emu3Config(
        text_config=text,
        vq_config=vq_config(source.vision.config),
        vocabulary_map=vocabulary_map,
        architectures=["Emu3ForConditionalGeneration"],
        dtype=dtype,
    )
    reason = processor_reason(source)
    if reason is None:
        files["tokenizer_config.json"]["processor_class"] = "Emu3Processor"
        files["preprocessor_config.json"] = _PREPROCESSOR
        files["processor_config.json"] = {"processor_class": "Emu3Processor"}
    notes = [reason or "The processor resizes, encodes and writes prompts as Emu3's own does."]
    if dtype != torch.float32:
        notes.append(
            "The vision tokenizer is stored in float32 and its codes are exact only there: load with "
            "`dtype=torch.float32`, then convert `model.model.text_model` and `model.lm_head` as you like."
        )
    weights = [(TEXT_PREFIX + name, tensor) for name, tensor in source.decoder.theirs(dtype)]
    weights += [(VISION_PREFIX + name, tensor) for name, tensor in vision_tensors(source.vision)]
    processor = ("", "") if reason else (", AutoProcessor", "\nprocessor = AutoProcessor.from_pretrained(folder)")
    return Contents(
        config=_plain(config),
        weights=weights,
        files=files,
        usage=(
            f"from transformers import AutoModelForImageTextToText, AutoTokenizer{processor[0]}\n"
            "model = AutoModelForImageTextToText.from_pretrained(folder)\n"
            f"tokenizer = AutoTokenizer.from_pretrained(folder){processor[1]}"
        ),
        warning=_RANDOM_WEIGHTS,
        notes=(*notes, _SPECIAL_STRINGS),
        front={"library_name": "transformers", "pipeline_tag": "any-to-any"},
    )


def _qwen3(source: Source, dtype: torch.dtype, text: dict[str, Any], files: dict[str, Any]) -> Contents:
    """Qwen3ForCausalLM; the vision tokenizer lies beside it."""
    config = Qwen3Config(**text, architectures=["Qwen3ForCausalLM"], dtype=dtype)
    place = (
        "The vision tokenizer is in `vision_tokenizer/`, in BAAI's layout, which transformers has no class for: use "
        "this project's `tools/generate.py`, or BAAI's code."
        if source.vision
        else "There is no vision tokenizer in this folder."
    )
    return Contents(
        config=_plain(config),
        weights=source.decoder.theirs(dtype),
        files=files,
        vision_files=None if source.vision is None else {},
        usage=(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "model = AutoModelForCausalLM.from_pretrained(folder)\n"
            "tokenizer = AutoTokenizer.from_pretrained(folder)"
        ),
        notes=(
            "The decoder has QK norm, which transformers' Emu3 classes do not know: it is exported as their "
            "`Qwen3ForCausalLM`, the same function, and there is no processor.",
            place,
            _SPECIAL_STRINGS,
        ),
        front={"library_name": "transformers", "pipeline_tag": "text-generation"},
    )


_RANDOM_WEIGHTS = (
    "**Load this folder with `AutoModelForImageTextToText`, also for text alone, and never with "
    "`AutoModelForCausalLM`.** transformers takes its `Emu3ForCausalLM` for the latter, which finds none of the "
    "weights under its own names and goes on with random ones, without an error; so do `pipeline('text-generation')` "
    "and lm-eval's `--model hf`."
)
# Upstream: transformers maps model_type emu3 to Emu3ForCausalLM, whose tensors are model.*; here they are
# text_model.model.*. selfcheck.py says when that changes.

_SPECIAL_STRINGS = (
    "The tokenizer gives the ids that training used, with one exception: it turns the string of a special token inside "
    "a text, such as `<|image start|>`, into that token's id; in training such strings were text. For untrusted text, "
    "call it with `split_special_tokens=True`, which always gives training's ids."
)


def processor_reason(source: Source) -> str | None:
    """Why transformers' Emu3Processor does not fit, in a sentence; None when it does."""
    factor = source.vision.config.spatial_factor
    if factor != PROCESSOR_SPATIAL_FACTOR:
        return (
            f"There is no processor: transformers' Emu3Processor is written for {PROCESSOR_SPATIAL_FACTOR} pixels per "
            f"code, this vision tokenizer has {factor}."
        )
    if not source.vocabulary.block.frame_ends:
        layout = source.vocabulary.layout.name
        return f"There is no processor: transformers' Emu3Processor does not know the picture format of {layout}."
    return None


def _plain(config: PreTrainedConfig | GenerationConfig) -> dict[str, Any]:
    return json.loads(config.to_json_string())

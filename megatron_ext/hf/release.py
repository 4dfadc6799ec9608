"""A complete Hugging Face folder: decoder, vision tokenizer, configuration, tokenizer and, where it fits, processor."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Emu3Config, GenerationConfig

from megatron_ext.config import InputError
from megatron_ext.hf.convert import (
    TEXT_PREFIX,
    VISION_PREFIX,
    VOCABULARY,
    decoder_tensors,
    is_hf_folder,
    vision_tensors,
)
from megatron_ext.hf.decoder import text_config
from megatron_ext.hf.tokenizer import build_tokenizer, tokenizer_config
from megatron_ext.hf.vision import vq_config
from megatron_ext.hf.weights import write_json, write_weights
from megatron_ext.model import Emu3Model
from megatron_ext.vision import MoVQGAN
from megatron_ext.vocab import Vocabulary

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
}

_SAMPLING = {"do_sample": True, "top_k": 2048}
"""BAAI's sampling of pictures (E3 image_generation.py:31-56)."""


def write_release(
    folder: str | Path,
    model: Emu3Model,
    vision: MoVQGAN,
    vocabulary: Vocabulary,
    *,
    max_position_embeddings: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write everything that `from_pretrained` wants into `folder`; config.json goes last, so a folder with it is whole.

    Args:
        dtype: type of the decoder's weights; the vision tokenizer stays in float32, or its codes would change.

    Raises:
        InputError: a shape, vocabulary or vision tokenizer that transformers' Emu3 cannot express, or a folder that
            holds a model that this function did not write.
    """
    folder = Path(folder)
    if is_hf_folder(folder) and not (folder / VOCABULARY).is_dir():
        raise InputError(f"{folder} holds a model that was not exported from here: give another output folder")
    layout = vocabulary.layout
    tokenizer = build_tokenizer(vocabulary.text, layout)
    config = Emu3Config(
        text_config=text_config(model.shape, layout, max_position_embeddings),
        vq_config=vq_config(vision.config),
        vocabulary_map=tokenizer.get_vocab(with_added_tokens=True),
        architectures=["Emu3ForConditionalGeneration"],
        dtype=dtype,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for stale in ("config.json", "preprocessor_config.json", "processor_config.json"):
        (folder / stale).unlink(missing_ok=True)
    write_weights(folder, _tensors(model, vision, dtype))
    temporary = folder / "tokenizer.json.tmp"
    tokenizer.save(str(temporary), pretty=False)
    os.replace(temporary, folder / "tokenizer.json")
    names = tokenizer_config(layout, max_position_embeddings)
    has_processor = processor_reason(vision, vocabulary) is None
    if has_processor:
        names["processor_class"] = "Emu3Processor"
        write_json(folder / "preprocessor_config.json", _PREPROCESSOR | {"processor_class": "Emu3Processor"})
        write_json(folder / "processor_config.json", {"processor_class": "Emu3Processor"})
    write_json(folder / "tokenizer_config.json", names)
    roles = {"bos_token_id": layout.bos, "eos_token_id": layout.eos, "pad_token_id": layout.pad}
    write_json(folder / "generation_config.json", _plain(GenerationConfig(**roles, **_SAMPLING)))
    vocabulary.save(folder / VOCABULARY)
    (folder / "README.md").write_text(_readme(model, vision, vocabulary, dtype), encoding="utf-8")
    write_json(folder / "config.json", _plain(config))


def processor_reason(vision: MoVQGAN, vocabulary: Vocabulary) -> str | None:
    """Why transformers' Emu3Processor does not fit, in a sentence; None when it does."""
    factor = vision.config.spatial_factor
    if factor != PROCESSOR_SPATIAL_FACTOR:
        return (
            f"There is no processor: transformers' Emu3Processor is written for {PROCESSOR_SPATIAL_FACTOR} pixels per "
            f"code, this vision tokenizer has {factor}."
        )
    if not vocabulary.block.frame_ends:
        layout = vocabulary.layout.name
        return f"There is no processor: transformers' Emu3Processor does not know the picture format of {layout}."
    return None


def _tensors(model: Emu3Model, vision: MoVQGAN, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in decoder_tensors(model, dtype):
        yield TEXT_PREFIX + name, tensor
    for name, tensor in vision_tensors(vision):
        yield VISION_PREFIX + name, tensor


def _plain(config: Emu3Config | GenerationConfig) -> dict[str, Any]:
    return json.loads(config.to_json_string())


def _readme(model: Emu3Model, vision: MoVQGAN, vocabulary: Vocabulary, dtype: torch.dtype) -> str:
    padding = 2 * (model.vocab_size - vocabulary.layout.size) * model.shape.hidden_size
    parameters = sum(parameter.numel() for parameter in model.parameters()) - padding
    reason = processor_reason(vision, vocabulary)
    imports = "AutoModelForImageTextToText, AutoTokenizer" + (", AutoProcessor" if reason is None else "")
    load_processor = "\nprocessor = AutoProcessor.from_pretrained(folder)" if reason is None else ""
    notes = [reason or "The processor resizes, encodes and writes prompts as Emu3's own does."]
    if dtype != torch.float32:
        notes.append(
            "The vision tokenizer is stored in float32 and its codes are exact only there: load with "
            "`dtype=torch.float32`, then convert `model.model.text_model` and `model.lm_head` as you like."
        )
    return f"""# Emu3 decoder and vision tokenizer

{model.shape.num_layers} layers, {parameters:,} parameters,
vocabulary `{vocabulary.layout.name}` of {vocabulary.layout.size:,} ids ({vocabulary.layout.codebook_size:,} visual),
vision tokenizer `{vision.identity}` with {vision.config.spatial_factor} pixels per code.

```python
from transformers import {imports}
model = AutoModelForImageTextToText.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder){load_processor}
```

{chr(10).join(notes)}

A picture is `[BOS] caption [SOV] height*width [SOT] visual ids, EOL after each row, EOF, [EOV] [EOS]`. The tokenizer
gives the ids that training used, with one exception: it turns the string of a special token inside a text, such as
`<|image start|>`, into that token's id; in training such strings were text. Do not feed it untrusted text.
"""

"""BAAI's own layout: the folders that github.com/baaivision/Emu3 loads, decoder and vision tokenizer apart.

Files and fields are those of BAAI/Emu3-Stage1 and BAAI/Emu3-VisionTokenizer on the hub. Their Python files are not ours
to give: `copied_code` takes them from the user's own copy.
"""

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config import InputError
from megatron_ext.hf.contents import Contents, Source
from megatron_ext.hf.vision import check_quantizer
from megatron_ext.vocab import VocabLayout, Vocabulary

DECODER_CODE = (
    "configuration_emu3.py", "modeling_emu3.py", "processing_emu3.py", "tokenization_emu3.py", "utils_emu3.py",
)  # fmt: skip
VISION_CODE = (
    "configuration_emu3visionvq.py", "image_processing_emu3visionvq.py", "modeling_emu3visionvq.py",
)  # fmt: skip

CODE_VERSION = "4.44.0"
"""transformers that BAAI's files are written for; they break in 4.51 (baaivision/Emu3 issue 74)."""

_USAGE = f"""# BAAI's code: pip install transformers=={CODE_VERSION}, and github.com/baaivision/Emu3 on the Python path.
# transformers looks for every package that BAAI's files import: without a GPU, an empty module flash_attn will do.
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer
from emu3.mllm.processing_emu3 import Emu3Processor
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, padding_side="left")
images = AutoImageProcessor.from_pretrained(f"{{folder}}/vision_tokenizer", trust_remote_code=True)
vision = AutoModel.from_pretrained(f"{{folder}}/vision_tokenizer", trust_remote_code=True).eval()
processor = Emu3Processor(images, vision, tokenizer)"""


def baai_contents(
    source: Source, dtype: torch.dtype, *, remote_code_from: str | Path | None, image_area: int
) -> Contents:
    """The folder of a decoder, with the vision tokenizer's in vision_tokenizer/.

    Args:
        remote_code_from: folder with BAAI's Python files; None leaves them and the fields that name them out.
        image_area: pixels of the pictures that the decoder was trained on; BAAI's training code reads it.

    Raises:
        InputError: a decoder, vocabulary or vision tokenizer that this layout cannot hold.
    """
    _check_fits(source)
    with_code = remote_code_from is not None
    files: dict[str, bytes | dict[str, Any]] = dict(tokenizer_files(source.vocabulary, with_code=with_code))
    roles = {f"{role}_token_id": getattr(source.vocabulary.layout, role) for role in ("bos", "eos", "pad")}
    files["generation_config.json"] = {"_from_model_config": True, **roles, "transformers_version": CODE_VERSION}
    vision_files: dict[str, bytes | dict[str, Any]] | None = None
    if source.vision is not None:
        check_quantizer(source.vision.config)
        vision_files = {
            "config.json": _vision_config(with_code=with_code),
            "preprocessor_config.json": _preprocessor(source.vision.config.spatial_factor, with_code=with_code),
        }
    if with_code:
        files |= copied_code(remote_code_from, DECODER_CODE)
        if vision_files is not None:
            vision_files |= copied_code(remote_code_from, VISION_CODE)
    return Contents(
        config=_config(source, dtype, image_area=image_area, with_code=with_code),
        weights=source.decoder.theirs(dtype),
        files=files,
        vision_files=vision_files,
        usage=_USAGE,
        notes=_notes(source, with_code=with_code),
        front={"library_name": "transformers", "pipeline_tag": "any-to-any"},
    )


def copied_code(folder: str | Path, names: Iterable[str]) -> dict[str, bytes]:
    """The user's own copies of the named files, from anywhere below `folder`.

    Raises:
        InputError: one is missing, or there are two that differ.
    """
    found = {}
    for name in names:
        contents = {path.read_bytes() for path in Path(folder).rglob(name)}
        if len(contents) != 1:
            raise InputError(
                f"remote_code_from {str(folder)!r} has {len(contents) or 'no'} versions of {name}, one is needed: "
                "give a folder with BAAI's own files, such as a clone of github.com/baaivision/Emu3"
            )
        found[name] = contents.pop()
    return found


def _check_fits(source: Source) -> None:
    shape, layout = source.decoder.shape, source.vocabulary.layout
    remedy = "write the transformers format"
    if shape.qk_layernorm:
        raise InputError(f"model.qk_layernorm is true: BAAI's Emu3 has no QK norm; {remedy}")
    if shape.kv_channels * shape.num_attention_heads != shape.hidden_size:
        raise InputError(
            f"model.kv_channels {shape.kv_channels} x model.num_attention_heads {shape.num_attention_heads} is not "
            f"model.hidden_size {shape.hidden_size}: BAAI's Emu3 has no other width of heads; {remedy}"
        )
    if layout != VocabLayout.emu3():
        raise InputError(
            f"vocab.layout is {layout.name}: BAAI's Emu3 tokenizer knows Emu3's {VocabLayout.emu3().size:,} ids and no "
            f"other; {remedy}"
        )


def _config(source: Source, dtype: torch.dtype, *, image_area: int, with_code: bool) -> dict[str, Any]:
    """BAAI's configuration_emu3.py reads these fields, in their order on the hub."""
    shape, layout = source.decoder.shape, source.vocabulary.layout
    auto_map = {"AutoConfig": "configuration_emu3.Emu3Config", "AutoModelForCausalLM": "modeling_emu3.Emu3ForCausalLM"}
    return {
        "architectures": ["Emu3ForCausalLM"],
        "attention_dropout": shape.attention_dropout,
        **({"auto_map": auto_map} if with_code else {}),
        "boi_token_id": layout.sov,
        "bos_token_id": layout.bos,
        "eof_token_id": layout.eof,
        "eoi_token_id": layout.eov,
        "eol_token_id": layout.eol,
        "eos_token_id": layout.eos,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "image_area": image_area,
        "img_token_id": layout.sot,
        "initializer_range": shape.init_method_std,
        "intermediate_size": shape.ffn_hidden_size,
        "max_position_embeddings": source.max_position_embeddings,
        "model_type": "Emu3",
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_query_groups,
        "pad_token_id": layout.pad,
        "pretraining_tp": 1,
        "rms_norm_eps": shape.layernorm_epsilon,
        "rope_scaling": None,
        "rope_theta": shape.rotary_base,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": CODE_VERSION,
        "use_cache": True,
        "vocab_size": layout.size,
    }


def tokenizer_files(vocabulary: Vocabulary, *, with_code: bool) -> dict[str, bytes | dict[str, Any]]:
    """The two files of BAAI's tokenizer, their digests those of the published ones, and its configuration."""
    layout = vocabulary.layout
    ranks = (base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(vocabulary.text.pieces()))
    added = range(min(layout.sov, layout.sot, layout.eov), layout.size)
    tokens = {role: layout.token_string(getattr(layout, role.removesuffix("_token"))) for role in _TOKENS}
    auto_map = {"auto_map": {"AutoTokenizer": ["tokenization_emu3.Emu3Tokenizer", None]}} if with_code else {}
    config = {
        "added_tokens_decoder": {},
        **auto_map,
        "bos_token": tokens["bos_token"],
        "clean_up_tokenization_spaces": True,
        "eos_token": tokens["eos_token"],
        "model_max_length": int(1e30),
        "pad_token": tokens["pad_token"],
        "tokenizer_class": "Emu3Tokenizer",
    }
    return {
        "emu3.tiktoken": b"".join(ranks),
        "emu3_vision_tokens.txt": "".join(f"{layout.token_string(token_id)}\n" for token_id in added).encode(),
        "special_tokens_map.json": tokens,
        "tokenizer_config.json": config,
    }


_TOKENS = ("bos_token", "eos_token", "pad_token")


def _preprocessor(spatial_factor: int, *, with_code: bool) -> dict[str, Any]:
    name = "Emu3VisionVQImageProcessor"
    auto_map = {"AutoImageProcessor": f"image_processing_emu3visionvq.{name}"}
    return {
        **({"auto_map": auto_map} if with_code else {}),
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_processor_type": name,
        "image_std": [0.5] * 3,
        "max_pixels": 1024 * 1024,
        "min_pixels": 512 * 512,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"max_pixels": 1024 * 1024, "min_pixels": 512 * 512},
        "spatial_factor": spatial_factor,
    }


def _vision_config(*, with_code: bool) -> dict[str, Any]:
    """What comes to the fields that `save_vision_tokenizer` writes."""
    auto_map = {
        "AutoConfig": "configuration_emu3visionvq.Emu3VisionVQConfig",
        "AutoModel": "modeling_emu3visionvq.Emu3VisionVQModel",
    }
    version = {"torch_dtype": "float32", "transformers_version": CODE_VERSION}
    return version | ({"auto_map": auto_map} if with_code else {})


def _notes(source: Source, *, with_code: bool) -> tuple[str, ...]:
    notes = []
    if source.vision is None:
        notes.append("There is no vision tokenizer in this folder; use the one that the data was made with.")
    if not with_code:
        notes.append(
            "BAAI's Python files are not in this folder and no configuration names them: copy them here from "
            "BAAI/Emu3-Stage1 and BAAI/Emu3-VisionTokenizer, or export again with `--remote_code_from`."
        )
    return tuple(notes)

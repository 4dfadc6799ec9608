"""A vision tokenizer on disk: config.json in BAAI's layout, model.safetensors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_ext.config import InputError, reason_of
from megatron_ext.files import replacing
from megatron_ext.vision.movqgan import CodesOrigin, MoVQGAN
from megatron_ext.vision.shape import VisionTokenizerConfig

MODEL_TYPES = {"nearest": "Emu3VisionVQ", "ibq": "Emu3VisionIBQ"}
"""By quantizer. Another name than BAAI's where its class would choose other codes for the same weights."""

ORIGIN_FIELD = "codes_of"
"""Field of config.json for a tokenizer's `origin`; BAAI's class passes over it."""


def save_vision_tokenizer(model: MoVQGAN, folder: str | Path) -> None:
    """Write config.json and model.safetensors into `folder`.

    Raises:
        OSError: the disk does not take them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model_type = MODEL_TYPES[model.config.quantizer]
    fields = {"model_type": model_type, "architectures": [f"{model_type}Model"], "double_z": False, "dropout": 0.0}
    fields |= model.config.fields()
    if model.origin is not None and model.identity == model.origin.identity:
        fields[ORIGIN_FIELD] = dataclasses.asdict(model.origin)
    with replacing(folder / "config.json") as description, replacing(folder / "model.safetensors") as weights:
        description.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        try:
            save_file(tensors, weights, metadata={"format": "pt"})
        except SafetensorError as error:  # what the system said is in its text alone
            raise OSError(str(error)) from error
        weights.chmod(0o644)  # safetensors gives its files to their owner alone


def load_vision_tokenizer(folder: str | Path) -> MoVQGAN:
    """The tokenizer saved in `folder`, or a downloaded copy of BAAI's Emu3-VisionTokenizer, in evaluation mode.

    Raises:
        InputError: files are missing, unreadable, of another model type, or do not match each other.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"vision tokenizer {str(folder)!r}: {name} is missing; give a folder that holds it")
    fields = _read_fields(folder / "config.json")
    model = MoVQGAN(_config(fields, folder / "config.json"))
    model.origin = _origin(fields, folder / "config.json")
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (RuntimeError, SafetensorError) as error:
        reason = reason_of(error)
        raise InputError(f"vision tokenizer {str(folder)!r}: model.safetensors does not fit: {reason}") from None
    return model.eval()


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None


def _config(fields: dict[str, Any], path: Path) -> VisionTokenizerConfig:
    expected = MODEL_TYPES.get(fields.get("quantizer", "nearest"))
    if expected is None:
        raise InputError(f"{path}: quantizer {fields['quantizer']!r} must be one of {', '.join(MODEL_TYPES)}")
    if fields.get("model_type") != expected or fields.get("double_z"):
        raise InputError(f"{path}: model_type {fields.get('model_type')!r} must be {expected!r} without double_z")
    known = {field.name for field in dataclasses.fields(VisionTokenizerConfig)}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items() if key in known}
    try:
        return VisionTokenizerConfig(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _origin(fields: dict[str, Any], path: Path) -> CodesOrigin | None:
    found = fields.get(ORIGIN_FIELD)
    try:
        return None if found is None else CodesOrigin(**found)
    except TypeError:
        raise InputError(
            f"{path}: {ORIGIN_FIELD} = {found!r} is not what a training of the decoder writes; take the field out, "
            "and the tokenizer has an identity of its own"
        ) from None

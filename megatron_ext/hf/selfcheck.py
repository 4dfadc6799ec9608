"""A release as a stranger uses it: transformers alone loads the folder and generates. Prints what it did, as JSON.

    HF_HUB_OFFLINE=1 python -I selfcheck.py FOLDER...

A program of its own: nothing of this project is imported.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Emu3ForCausalLM,
    Emu3TextConfig,
)

TEXT = "A red fox, 一只狐狸 🦊"
GRID = 2
"""Rows and columns of the drawn picture."""


def main(folder: str) -> None:
    """Check the folder by what its config.json says it is."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    check = {"emu3": check_emu3, "qwen3": check_text, "Emu3": check_baai}[config["model_type"]]
    print(json.dumps({"model_type": config["model_type"], **check(folder, config)}))


def load(model_class: type, folder: str, **options: object) -> torch.nn.Module:
    """The model, every tensor of which comes from the folder, in the folder's own type."""
    model, report = model_class.from_pretrained(
        folder, dtype="auto", local_files_only=True, output_loading_info=True, **options
    )
    wrong = {name: sorted(keys) for name, keys in report.items() if keys and not isinstance(keys, str)}
    assert not wrong, f"weights do not fit the class: {wrong}"
    return model.eval()


def check_dtype(model: torch.nn.Module, config: dict) -> str:
    """The decoder has the type that was chosen."""
    chosen = config.get("dtype") or config["torch_dtype"]
    found = str(model.lm_head.weight.dtype).removeprefix("torch.")
    assert found == chosen, f"weights are {found}, config.json says {chosen}"
    return found


def check_emu3(folder: str, config: dict) -> dict:
    """Draw a small picture with Emu3ForConditionalGeneration, through the processor where there is one."""
    model = load(AutoModelForImageTextToText, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT, "the tokenizer does not give the text back"
    has_processor = (Path(folder) / "processor_config.json").is_file()
    if has_processor:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        side = GRID * processor.downsample_ratio
        inputs = processor(
            text=[TEXT], return_for_image_generation=True, ratio="1:1", image_area=side**2, return_tensors="pt"
        )
        ids = inputs["input_ids"]
    else:
        start = f"{tokenizer.boi_token}{GRID}*{GRID}{tokenizer.image_wrapper_token}"
        ids = tokenizer(tokenizer.bos_token + TEXT + start, add_special_tokens=False, return_tensors="pt").input_ids
    eol, *ending = tokenizer.convert_tokens_to_ids(
        ["<|extra_200|>", tokenizer.eof_token, tokenizer.eoi_token, tokenizer.eos_token]
    )
    visual = model.vocabulary_mapping.image_tokens

    def allowed(_: int, so_far: torch.Tensor) -> list[int]:
        row, column = divmod(len(so_far) - ids.shape[1], GRID + 1)
        return [ending[column]] if row == GRID else [eol] if column == GRID else visual

    length = GRID * (GRID + 1) + len(ending)
    drawn = model.generate(
        ids, max_new_tokens=length, min_new_tokens=length, do_sample=False, prefix_allowed_tokens_fn=allowed
    )
    pixels = model.decode_image_tokens(image_tokens=drawn[:, ids.shape[1] :], height=GRID, width=GRID)
    side = GRID * model.model.vqmodel.vision_spatial_factor
    assert pixels.shape[-2:] == (side, side) and pixels.isfinite().all(), "the drawn picture is broken"
    done = {
        "model": type(model).__name__,
        "dtype": check_dtype(model, config),
        "processor": has_processor,
        "drew": [side, side],
    }
    del model  # the next takes as much memory
    return {**done, "AutoModelForCausalLM": what_causal_lm_gives(folder)}


def what_causal_lm_gives(folder: str) -> str:
    """Whose weights the class for texts has that transformers takes for the folder: the card warns of random ones."""
    _, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, output_loading_info=True
    )
    return "random weights, see the model card" if report["missing_keys"] else "the folder's weights"


def check_text(folder: str, config: dict) -> dict:
    """Continue a text with a plain language model."""
    model = load(AutoModelForCausalLM, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer(tokenizer.bos_token + TEXT, add_special_tokens=False, return_tensors="pt").input_ids
    return {"model": type(model).__name__, "dtype": check_dtype(model, config), "generated": generate(model, ids)}


def check_baai(folder: str, config: dict) -> dict:
    """BAAI's layout in transformers' text model, which has the same names; BAAI's own code needs transformers 4.44."""
    model = load(Emu3ForCausalLM, folder, config=Emu3TextConfig(**config))
    return {
        "model": type(model).__name__,
        "dtype": check_dtype(model, config),
        "generated": generate(model, torch.tensor([[config["bos_token_id"]]])),
    }


def generate(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Ids that were generated after `ids`."""
    wanted = 4
    output = model.generate(ids, max_new_tokens=wanted, min_new_tokens=wanted, do_sample=False)
    assert output.shape[1] == ids.shape[1] + wanted, "generation ended early"
    return wanted


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(argument)

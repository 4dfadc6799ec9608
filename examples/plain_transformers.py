"""The exported folder in plain transformers: a caption becomes a picture, the picture becomes a caption.

    python examples/plain_transformers.py FOLDER "CAPTION" PICTURE.png

Nothing of this project is imported. transformers' Emu3Processor knows 8 pixels per code only, so the prompts are
written here: `[BOS] caption [SOV] height*width [SOT]`, then codes with EOL after each row, EOF, EOV, EOS. Greedy.
"""

import sys

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

ROWS = COLUMNS = 16


def main(folder: str, caption: str, picture_path: str) -> None:
    """Draw `caption` into `picture_path` and describe what was drawn."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    block_start = f"{tokenizer.boi_token}{ROWS}*{COLUMNS}{tokenizer.image_wrapper_token}"
    eol, eof, eov = (
        tokenizer.convert_tokens_to_ids(token) for token in ("<|extra_200|>", tokenizer.eof_token, tokenizer.eoi_token)
    )
    visual = model.vocabulary_mapping.image_tokens
    ending = [eof, eov, tokenizer.eos_token_id]

    prompt = tokenizer(f"{tokenizer.bos_token}{caption}{block_start}", add_special_tokens=False, return_tensors="pt")
    start = prompt.input_ids.shape[1]

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        row, column = divmod(len(ids) - start, COLUMNS + 1)
        if row == ROWS:
            return [ending[column]]
        return [eol] if column == COLUMNS else visual

    length = ROWS * (COLUMNS + 1) + len(ending)
    drawn = model.generate(**prompt, max_new_tokens=length, do_sample=False, prefix_allowed_tokens_fn=allowed)
    pixels = model.decode_image_tokens(image_tokens=drawn[:, start:], height=ROWS, width=COLUMNS)
    picture = (
        pixels.reshape(-1, *pixels.shape[-3:])[0] + 1
    ) * 127.5  # a still is the first of the frames it decodes to
    Image.fromarray(picture.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()).save(picture_path)

    begun = tokenizer(f"{tokenizer.bos_token}{block_start}", add_special_tokens=False, return_tensors="pt").input_ids
    described = torch.cat([begun, drawn[:, start : start + length - 1]], dim=1)  # up to EOV: a caption may follow
    text = model.generate(described, max_new_tokens=96, do_sample=False)[0, described.shape[1] :]
    print(f"drew {picture_path} for: {caption}")
    print(f"captioned it: {tokenizer.decode(text, skip_special_tokens=True)}")


if __name__ == "__main__":
    main(*sys.argv[1:])

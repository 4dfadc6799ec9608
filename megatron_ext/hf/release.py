"""A complete Hugging Face folder: weights, configuration, tokenizer, model card, provenance and checksums."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_ext.config import InputError, reason_of
from megatron_ext.hf.baai import baai_contents
from megatron_ext.hf.card import model_card
from megatron_ext.hf.classes import transformers_contents
from megatron_ext.hf.contents import Contents, Source
from megatron_ext.hf.convert import VISION_FOLDER, VOCABULARY, is_hf_folder
from megatron_ext.hf.weights import write_json, write_weights
from megatron_ext.vision import save_vision_tokenizer

Format = Literal["transformers", "baai"]

SUMS = "SHA256SUMS"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
SELF_CHECK = Path(__file__).with_name("selfcheck.py")


def write_release(
    folder: str | Path,
    source: Source,
    *,
    format: Format = "transformers",
    dtype: torch.dtype = torch.float32,
    remote_code_from: str | Path | None = None,
    image_area: int = 512 * 512,
) -> tuple[str, ...]:
    """Write the whole release; `folder` gets its name when all is there, in place of an earlier export.

    Args:
        dtype: type of the decoder's weights; the vision tokenizer stays in float32, or its codes would change.
        remote_code_from: for `baai`: see `baai_contents`.
        image_area: for `baai`: see `baai_contents`.

    Returns:
        What to know about the folder, and what the format cannot hold, in sentences.

    Raises:
        InputError: a shape, vocabulary or vision tokenizer that the format cannot express, or a folder that holds what
            this function did not write.
    """
    folder = Path(folder)
    _refuse_others_folder(folder)
    if format == "baai":
        contents = baai_contents(source, dtype, remote_code_from=remote_code_from, image_area=image_area)
    elif remote_code_from is not None:
        raise InputError("remote_code_from: the transformers format has no code of its own; leave it out")
    else:
        contents = transformers_contents(source, dtype)
    contents = dataclasses.replace(contents, notes=(*contents.notes, *_about_rounding(source, dtype)))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write(partial, contents, source, dtype)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    return contents.notes


def _about_rounding(source: Source, dtype: torch.dtype) -> list[str]:
    """That weights are written in a wider type than they were read in, in a sentence."""
    types = {tensor.dtype for tensor in source.decoder.tensors.values()}
    narrow = sorted(str(found).removeprefix("torch.") for found in types if found.itemsize < dtype.itemsize)
    if not narrow:
        return []
    return [
        f"The decoder's weights are the rounded ones ({', '.join(narrow)}): the checkpoint has no fp32 master weights "
        "by name, as checkpoint.optimizer_format fully_reshardable saves them."
    ]


def _refuse_others_folder(folder: Path) -> None:
    if not folder.exists() or (folder / VOCABULARY).is_dir() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if is_hf_folder(folder):
        raise InputError(f"{folder} holds a model that was not exported from here: give another output folder")
    raise InputError(f"{folder} is not empty and no earlier export: give another output folder")


def _write(folder: Path, contents: Contents, source: Source, dtype: torch.dtype) -> None:
    write_weights(folder, contents.weights)
    _write_files(folder, contents.files)
    if contents.vision_files is not None:
        save_vision_tokenizer(source.vision, folder / VISION_FOLDER)
        _write_files(folder / VISION_FOLDER, contents.vision_files)
    source.vocabulary.save(folder / VOCABULARY)
    write_json(folder / "provenance.json", source.provenance)
    (folder / "README.md").write_text(_card(contents, source, dtype), encoding="utf-8")
    write_json(folder / "config.json", contents.config)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = "".join(f"{sha256_of(path)}  {path.relative_to(folder)}\n" for path in paths)
    (folder / SUMS).write_text(sums, encoding="utf-8")


def _write_files(folder: Path, files: Mapping[str, bytes | dict[str, Any]]) -> None:
    for name, content in files.items():
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            write_json(path, earlier | content)


def _card(contents: Contents, source: Source, dtype: torch.dtype) -> str:
    layout, vision = source.vocabulary.layout, source.vision
    tokenizer = (
        f"vision tokenizer `{vision.identity}` with {vision.config.spatial_factor} pixels per code"
        if vision
        else "no vision tokenizer"
    )
    notes = "\n".join(f"- {note}" for note in contents.notes)
    type_name = str(dtype).removeprefix("torch.")
    row_end = "EOL after each row, EOF" if source.vocabulary.block.frame_ends else "EOL between rows"
    warning = f"> {contents.warning}\n\n" if contents.warning else ""
    body = f"""{warning}{source.decoder.shape.num_layers} layers, {source.decoder.parameters:,} parameters in
{type_name}, vocabulary `{layout.name}` of {layout.size:,} ids ({layout.codebook_size:,} visual), {tokenizer}.

```python
{contents.usage}
```

{notes}
- A picture is `[BOS] caption [SOV] height*width [SOT] visual ids, {row_end}, [EOV] [EOS]`.
- Every document of the training begins with BOS, and the tokenizer does not write it: put `tokenizer.bos_token` before
  a text, or have your tool do so (lm-eval: `add_bos_token=True`).
- `sha256sum -c {SUMS}` tells whether all files are as they were written.
"""
    return model_card(
        title="Emu3 decoder and vision tokenizer" if vision else "Emu3 decoder",
        front=contents.front | {"tags": ["emu3"]},
        body=body,
        provenance=source.provenance,
    )


def check_release(folder: str | Path) -> dict[str, Any]:
    """Check a release as a stranger finds it; returns what was done.

    Every file against SHA256SUMS; then, in a process that knows nothing of this project and has no network,
    transformers loads the folder and generates (selfcheck.py).

    Raises:
        InputError: the folder is not what was written, or transformers cannot use it.
    """
    folder = Path(folder)
    files = _check_sums(folder)
    command = [sys.executable, "-I", str(SELF_CHECK), str(folder)]
    result = subprocess.run(command, env=os.environ | OFFLINE, capture_output=True, text=True)
    if result.returncode != 0:
        reason = result.stderr.strip().splitlines()[-1:] or [f"exit code {result.returncode}"]
        raise InputError(f"{folder} does not work in transformers: {reason_of(reason[0])}")
    return {"files": files, **json.loads(result.stdout.splitlines()[-1])}


def _check_sums(folder: Path) -> int:
    """Number of files, all as SHA256SUMS says."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder / SUMS}: cannot be read ({error}); give a folder that convert_checkpoint wrote"
        ) from None
    for name, digest in expected.items():
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing: copy or export the folder again")
        if sha256_of(folder / name) != digest:
            raise InputError(f"{folder / name} is not what was written: copy or export the folder again")
    return len(expected)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

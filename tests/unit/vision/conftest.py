"""A small tokenizer, a folder of media, and the arguments that tokenize it."""

import json

import av
import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ext.vision import MoVQGAN, VisionTokenizerConfig, save_vision_tokenizer

TINY = VisionTokenizerConfig(codebook_size=64, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(2,))


@pytest.fixture
def tokenizer(tmp_path):
    torch.manual_seed(0)
    model = MoVQGAN(TINY).eval()
    with torch.no_grad():
        latents = model.latents(torch.rand(2, 3, 16, 16) * 2 - 1)
        model.quantize.embedding.weight.normal_().mul_(latents.std()).add_(latents.mean())
    save_vision_tokenizer(model, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def media(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    random = np.random.default_rng(0)
    for key, size in {"a": (32, 32), "b": (32, 48), "c": (32, 32), "e": (40, 40)}.items():
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{key}.png")
        (folder / f"{key}.txt").write_text(f"Picture {key}.")
    (folder / "a.json").write_text(json.dumps({"caption_zh": "图片"}), encoding="utf-8")
    (folder / "d.jpg").write_bytes(b"damaged")
    with av.open(str(folder / "v.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "bgr0"
        for _ in range(9):
            frame = av.VideoFrame.from_ndarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode(None))
    return folder


@pytest.fixture
def arguments(media, tokenizer, tmp_path):
    return [
        f"--inputs=[{media}]",
        f"--tokenizer={tokenizer}",
        f"--output={tmp_path / 'codes'}",
        "--resize.min_pixels=1024",
        "--resize.max_pixels=2048",
        "--batch_size=2",
        "--max_bad_fraction=0.4",
        "--decode_workers=0",
        "--device=cpu",
    ]

"""DALI on a GPU: nvJPEG and NVDEC give the pictures that the CPU loader gives. No bound here has been measured yet."""

import contextlib
from pathlib import Path

import pytest
import torch

from megatron_ext.media import MediaIndex, build_index
from tokenizer_train.vision.config_media import MediaConfig
from tokenizer_train.vision.data import TrainingMedia
from tokenizer_train.vision.loader_cpu import CpuLoader
from tokenizer_train.vision.loader_dali import DaliLoader
from tokenizer_train.vision.order import Draw

MEDIA = Path(__file__).parents[2] / "examples/media"


@pytest.fixture(scope="module")
def index() -> MediaIndex:
    return build_index([str(MEDIA)], None, lambda *_: contextlib.nullcontext(lambda count: None))


# nvJPEG and NVDEC bring chroma to full size by filters of their own: set from DALI's decoders on the CPU, doubled.
@pytest.mark.parametrize(("is_clip", "mean", "largest"), [(False, 2.0, 48), (True, 5.0, 96)])
def test_gpu_decoders_agree_with_the_cpu_loader(index, is_clip, mean, largest, monkeypatch):
    cpu = CpuLoader(index, smallest_scale=1.0, cache_bytes=0)
    dali = DaliLoader(index, cpu, device_id=0, threads=2, largest_batch=8)
    numbers = [number for number in range(len(index)) if index.is_clip[number] == is_clip][:8]
    draws = [
        Draw(
            sample=number, box=(21, 34, 120, 96), is_mirrored=True, height=96, width=80,
            frames=(1, 5, 9, 20) if is_clip else (),
        )
        for number in numbers
    ]  # fmt: skip
    expected = cpu.decode(draws)
    monkeypatch.setattr(dali, "_cpu", None)
    for one, other in zip(dali.decode(draws), expected, strict=True):
        difference = (one.cpu().int() - other.int()).abs()
        assert one.is_cuda and difference.float().mean() < mean and difference.max() <= largest


def test_auto_decodes_where_the_training_is():
    config = MediaConfig(inputs=[str(MEDIA)], size=64, batch_size=8, clip_share=0.5)
    media = TrainingMedia(config, seed=1, chunk_frames=4, device=torch.device("cuda", 0))
    batches = [media.batch(step) for step in range(1, 9)]
    media.close()
    assert all(batch.is_cuda and torch.isfinite(batch).all() for batch in batches)
    assert {batch.ndim for batch in batches} == {4, 5}

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


def test_a_batch_is_whole_however_much_the_device_has_to_do(index):
    """A copy that waits behind the training's kernels would find the next batch in DALI's buffers."""
    dali = DaliLoader(
        index, CpuLoader(index, smallest_scale=1.0, cache_bytes=0), device_id=0, threads=2, largest_batch=4
    )
    numbers = [number for number in range(len(index)) if index.codec(number) == "jpeg"][:8]
    draws = [
        Draw(sample=number, box=(0, 0, 128, 128), is_mirrored=False, height=128, width=128, frames=())
        for number in numbers
    ]
    batches = [draws[:4], draws[4:], draws[:4]]
    expected = []
    for batch in batches:
        expected.append([frame.cpu() for frame in dali.decode(batch)])  # .cpu() waits
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # some two seconds of the default stream, as of a training ahead of its kernels
    found = [dali.decode(batch) for batch in batches]
    stacked = [torch.stack(frames) for frames in found]
    del found  # their memory is free again while the stacking still waits
    again = [dali.decode(batch) for batch in batches]
    torch.cuda.synchronize()
    assert not torch.equal(torch.stack(expected[0]), torch.stack(expected[1]))
    for batch, more, other in zip(stacked, again, expected, strict=True):
        assert torch.equal(batch.cpu(), torch.stack(other)) and torch.equal(torch.stack(more).cpu(), torch.stack(other))


def test_auto_decodes_where_the_training_is():
    config = MediaConfig(inputs=[str(MEDIA)], size=64, batch_size=8, clip_share=0.5)
    media = TrainingMedia(config, seed=1, chunk_frames=4, device=torch.device("cuda", 0))
    batches = [media.batch(step) for step in range(1, 9)]
    media.close()
    assert all(batch.is_cuda and torch.isfinite(batch).all() for batch in batches)
    assert {batch.ndim for batch in batches} == {4, 5}

"""Clips in pieces: the codes and pixels of the whole clip, in the memory of a piece; stills in training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext.config import InputError
from megatron_ext.vision import MoVQGAN
from megatron_ext.vision.blocks import Upsample
from megatron_ext.vision.movqgan import PIXELS_AT_ONCE
from tests.support.memory import LiveBytes
from tests.unit.vision.test_movqgan import random_tokenizer


def causal_conv_of_the_whole(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A causal convolution written out: every output frame from the frames under its kernel, zeros before the clip."""
    taps, stride = conv.kernel_size[0], conv.stride[0]
    padded = torch.cat((torch.zeros_like(x[:, :, :1]), torch.zeros_like(x[:, :, :1]), x), dim=2)
    frames = []
    for start in range(0, padded.shape[2] - taps + 1, stride):
        frame = sum(
            F.conv2d(padded[:, :, start + tap], conv.weight[:, :, tap], padding=conv.padding[1:]) for tap in range(taps)
        )
        frames.append(frame + conv.bias.view(1, -1, 1, 1))
    return torch.stack(frames, dim=2)


def whole_clip_latents(model: MoVQGAN, clip: Tensor) -> Tensor:
    """The encoder over the whole clip, its temporal part in plain torch, frame by frame."""
    h = torch.stack([model.encoder.frames(clip[:, frame]) for frame in range(clip.shape[1])], dim=2)
    for down in model.encoder.time_conv:
        h = F.silu(causal_conv_of_the_whole(down.conv.conv, h))
    for block in model.encoder.time_res_stack:
        inner = h
        for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
            inner = causal_conv_of_the_whole(conv.conv, F.silu(norm(inner)))
        h = h + inner
    return causal_conv_of_the_whole(model.quant_conv.conv, h)


@pytest.mark.parametrize("pieces", [(4, 4, 4, 4, 4), (8, 4, 8), (20,)])
@torch.no_grad()
def test_a_stream_gives_codes_and_pixels_of_the_whole_clip(pieces):
    model = random_tokenizer()
    clip = torch.rand(2, 20, 3, 16, 24) * 2 - 1
    expected = model.quantize.assign(whole_clip_latents(model, clip))
    assert not torch.equal(expected, model.encode_chunks(clip)), "the frames before make no difference here"
    codes = list(model.encode_stream(clip.split(pieces, dim=1)))
    assert [part.shape[1] for part in codes] == [frames // 4 for frames in pieces]
    assert torch.equal(torch.cat(codes, dim=1), expected)
    pixels = torch.cat(list(model.decode_stream(codes)), dim=1)
    # Measured 0: torch adds in the same order whatever the length; it need not.
    torch.testing.assert_close(pixels, model.decode(expected), rtol=0, atol=1e-5)
    assert (pixels - model.decode_chunks(expected)).abs().max() > 1e-2


@torch.no_grad()
def test_a_stream_s_memory_does_not_grow_with_the_clip():
    model = random_tokenizer()

    def peak(frames: int) -> int:
        def pieces():
            for _ in range(0, frames, 4):
                yield torch.rand(1, 4, 3, 32, 32)

        with LiveBytes(()) as live:
            seen = sum(pixels.shape[1] for pixels in model.decode_stream(model.encode_stream(pieces())))
        assert seen == frames
        return live.most

    assert peak(64) == peak(8) < 0.5 * _whole_peak(model, 64)


def _whole_peak(model: MoVQGAN, frames: int) -> int:
    with LiveBytes(()) as live:
        model.decode(model.encode(torch.rand(1, frames, 3, 32, 32)))
    return live.most


def test_a_still_is_no_piece_of_a_stream():
    model = random_tokenizer()
    with pytest.raises(InputError, match=r"\(1, 3, 16, 16\): must be a clip"):
        next(model.encode_stream([torch.zeros(1, 3, 16, 16)]))
    with pytest.raises(InputError, match="clip of 3 frames"):
        next(model.encode_stream([torch.zeros(1, 3, 3, 16, 16)]))


def test_training_on_stills_has_the_statistics_and_gradients_of_four_equal_frames():
    once = random_tokenizer().double().train()
    repeated = copy.deepcopy(once)
    pixels = torch.rand(3, 3, 24, 32, dtype=torch.float64) * 2 - 1
    clip = pixels.unsqueeze(1).repeat(1, 4, 1, 1, 1)
    F.mse_loss(once.render_first_frame(once.latents(pixels)), pixels).backward()
    F.mse_loss(repeated.render(repeated.latents(clip))[:, 0], pixels).backward()
    statistics = {name: buffer for name, buffer in once.named_buffers() if "running" in name}
    assert len(statistics) == 8
    for name, buffer in statistics.items():
        torch.testing.assert_close(buffer, repeated.get_buffer(name), rtol=1e-12, atol=0)  # measured 0
    largest = max(weight.grad.abs().max().item() for weight in once.parameters() if weight.grad is not None)
    for name, weight in once.named_parameters():
        if weight.grad is not None:
            # Measured 9e-16 of the largest: four equal gradients are added instead of one taken four times.
            limit = 1e-13 * largest
            torch.testing.assert_close(weight.grad, repeated.get_parameter(name).grad, rtol=0, atol=limit, msg=name)


@torch.no_grad()
def test_frames_in_parts_equal_frames_at_once(monkeypatch):
    model = random_tokenizer()
    clip = torch.rand(2, 8, 3, 16, 24) * 2 - 1
    codes, pixels = model.encode(clip), model.decode(model.encode(clip))
    monkeypatch.setitem(PIXELS_AT_ONCE, "cpu", 3 * 16 * 24)
    assert torch.equal(model.encode(clip), codes)
    torch.testing.assert_close(model.decode(codes), pixels, rtol=0, atol=1e-4)  # measured 5e-6 of 24


@pytest.mark.parametrize("shape", [(1, 32, 5, 7), (2, 64, 1, 1)])
def test_upsampling_by_quarters_is_nearest_and_convolution(shape):
    torch.manual_seed(0)
    up = Upsample(shape[1])
    x = torch.randn(shape, requires_grad=True)
    expected = up.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    weight = torch.randn_like(expected)
    gradients = []
    for out in (up(x), expected):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)  # measured 8e-7
        gradients.append(torch.autograd.grad((out * weight).sum(), (x, up.conv.weight, up.conv.bias)))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)  # measured 2e-5

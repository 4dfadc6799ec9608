"""The PatchGANs: layers as SBER's, what a score sees, clips frame by frame in view of their neighbours."""

import pytest
import torch
from torch import nn

from megatron_ext.config import InputError
from tokenizer_train.vision.config import DiscriminatorConfig
from tokenizer_train.vision.discriminator import Discriminator, PatchGAN


def sber(width: int) -> nn.Sequential:
    """SBER's discriminator of two strided layers, written out."""
    return nn.Sequential(
        nn.Conv2d(3, width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 4 * width, 4, 1, 1, bias=False),
        nn.BatchNorm2d(4 * width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4 * width, 1, 4, 1, 1),
    )


def test_pictures_have_sbers_layers():
    ours, theirs = PatchGAN(DiscriminatorConfig(width=8, num_layers=2), clips=False), sber(8)
    theirs.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in ours.state_dict().items()})
    pixels = torch.randn(2, 3, 24, 16)
    assert torch.equal(ours(pixels), theirs(pixels))


@pytest.mark.parametrize("num_layers, field", [(2, 34), (3, 70)])
def test_a_score_sees_so_many_pixels(num_layers, field):
    network = PatchGAN(DiscriminatorConfig(width=4, num_layers=num_layers, norm="group"), clips=False)
    network.layers = nn.Sequential(*(layer for layer in network.layers if not isinstance(layer, nn.GroupNorm)))
    pixels = torch.randn(1, 3, 192, 192, requires_grad=True)
    scores = network(pixels)
    row = scores.shape[-1] // 2
    scores[0, 0, row, row].backward()
    seen = pixels.grad.abs().sum((0, 1, 3)).nonzero()
    assert seen.max() - seen.min() + 1 == field


def test_clips_are_judged_frame_by_frame_in_view_of_their_neighbours():
    network = PatchGAN(DiscriminatorConfig(width=4, num_layers=2, norm="group"), clips=True)
    for frames in (1, 4, 9):
        assert network(torch.randn(2, frames, 3, 16, 24)).shape == (2, 1, frames, 2, 4)
    network.layers = nn.Sequential(*(layer for layer in network.layers if not isinstance(layer, nn.GroupNorm)))
    clip = torch.randn(1, 12, 3, 16, 16, requires_grad=True)
    network(clip)[0, 0, 0].sum().backward()
    seen = clip.grad.abs().sum((0, 2, 3, 4)) > 0
    assert seen.tolist() == [True] * 5 + [False] * 7, "four layers, one frame further with each"


def test_group_norms_judge_each_picture_by_itself():
    pixels = torch.randn(3, 3, 16, 16)
    for norm, alone in (("group", True), ("batch", False)):
        network = PatchGAN(DiscriminatorConfig(width=16, num_layers=2, norm=norm), clips=False)
        together, single = network(pixels)[:1], network(pixels[:1])
        assert torch.allclose(together, single, atol=1e-5) == alone


def test_only_the_networks_that_the_media_need():
    config = DiscriminatorConfig(width=4)
    for share, pictures, clips in ((0.0, True, False), (0.3, True, True), (1.0, False, True)):
        found = Discriminator(config, clip_share=share)
        assert (found.pictures is not None, found.clips is not None) == (pictures, clips)


def test_too_small_frames_are_refused():
    network = PatchGAN(DiscriminatorConfig(width=4, num_layers=3), clips=False)
    assert network(torch.zeros(1, 3, 24, 24)).shape[-2:] == (1, 1)
    with pytest.raises(InputError, match="frames of 16x64 pixels: discriminator.num_layers asks for at least 24"):
        network(torch.zeros(1, 3, 16, 64))

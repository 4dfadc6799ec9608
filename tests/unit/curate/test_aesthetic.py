"""The predictor against CLIP and the heads written out in plain torch, and against transformers' preprocessing."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from megatron_ext.config import InputError
from megatron_ext.curate.aesthetic import AestheticPredictor
from megatron_ext.curate.pictures import clip_square
from tests.support.small_clip import SIDE, head_weights, plain_scores, save_clip
from tests.unit.curate.drawn import clouds


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("layout, suffix", [("linear", "pth"), ("improved", "pth"), ("improved", "safetensors")])
def test_scores(clip, tmp_path, layout, suffix):
    weights = head_weights(layout)
    head = tmp_path / f"head.{suffix}"
    if suffix == "pth":
        torch.save(weights, head)
    else:
        save_file(weights, head)
    predictor = AestheticPredictor(clip, head)
    assert predictor.side == SIDE
    pictures = [
        *(clouds(seed, 70, 90) for seed in range(3)),
        *(np.full((60, 80, 3), grey, np.uint8) for grey in (0, 255)),
    ]
    squares = np.stack([clip_square(picture, SIDE) for picture in pictures])
    expected = plain_scores(squares, CLIPVisionModelWithProjection.from_pretrained(clip).state_dict(), weights).numpy()
    assert np.ptp(expected) > 0.01  # a thousand times the bound below
    np.testing.assert_allclose(predictor.rate(squares), expected, atol=1e-5)  # measured: 3.1e-6


def test_the_identity_is_that_of_the_weights(clip, tmp_path):
    identities = set()
    for seed, suffix in ((0, "pth"), (0, "safetensors"), (1, "pth")):
        path = tmp_path / f"{seed}.{suffix}"
        (torch.save if suffix == "pth" else save_file)(head_weights("linear", seed), path)
        identities.add(AestheticPredictor(clip, path).identity)
    assert len(identities) == 2


@pytest.mark.parametrize("height, width", [(56, 56), (70, 91), (333, 57), (40, 55), (300, 299)])
def test_the_square_is_transformers_own(height, width):
    picture = clouds(3, height, width)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE},
                                      do_normalize=False, do_rescale=False)  # fmt: skip
    expected = np.asarray(processor(picture, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
    assert clip_square(picture, SIDE).shape == (SIDE, SIDE, 3)
    np.testing.assert_array_equal(clip_square(picture, SIDE), expected)


def test_bad_files(clip, tmp_path):
    head = tmp_path / "head.pth"
    with pytest.raises(InputError, match="no config.json there"):
        AestheticPredictor(tmp_path, head)
    with pytest.raises(InputError, match="head.pth cannot be loaded"):
        AestheticPredictor(clip, head)
    head.write_bytes(b"nothing")
    with pytest.raises(InputError, match="head.pth cannot be loaded"):
        AestheticPredictor(clip, head)
    torch.save({f"layers.{n}.weight": torch.zeros(1, 1) for n in (0, 3, 6)}, head)
    with pytest.raises(InputError, match=r"holds layers.0.weight, .*give LAION's linear head"):
        AestheticPredictor(clip, head)
    torch.save({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, head)
    with pytest.raises(InputError, match="takes embeddings of 768 numbers, .* makes 24"):
        AestheticPredictor(clip, head)

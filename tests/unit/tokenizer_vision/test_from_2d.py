"""A tokenizer from a 2D checkpoint is the 2D model until its first step; what does not fit is refused."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from megatron_ext.config import InputError
from megatron_ext.files import read_json_lines
from megatron_ext.vision import VisionTokenizerConfig, load_vision_tokenizer
from tests.support import movqgan_2d
from tokenizer_train.vision import from_2d, train
from tokenizer_train.vision.config import VisionOptimConfig
from tokenizer_train.vision.from_2d import read_2d, tokenizer_from_2d
from tokenizer_train.vision.optimizer import NetworkOptimizer

OLD_CODES = 192
SHAPE = dict(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(2,))
CONFIG = VisionTokenizerConfig(codebook_size=2 * OLD_CODES, **SHAPE)


@pytest.fixture(scope="module")
def weights():
    """A 2D model whose latents are as wide as its codes."""
    torch.manual_seed(4)
    made = movqgan_2d.random_weights(32, (1, 1, 2), 1, OLD_CODES)
    made["encoder.conv_out.weight"] *= 3
    return made


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("2d") / "movqgan.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def pixels():
    """Eight pictures, 2,048 latents, with plain areas as pictures have."""
    random = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.nn.functional.interpolate(random, size=(64, 64), mode="bilinear").clamp(-1, 1)


@pytest.mark.parametrize("training", [False, True])
def test_a_still_is_the_2d_models(weights, checkpoint, pixels, training):
    torch.manual_seed(0)
    start = tokenizer_from_2d(checkpoint, CONFIG)
    assert start.num_new_codes == OLD_CODES
    model = start.model.train(training)
    with torch.no_grad():
        codes, expected = model.encode(pixels), movqgan_2d.encode(weights, pixels)
        assert torch.equal(codes, expected) and len(expected.unique()) > OLD_CODES / 2
        drawn = movqgan_2d.decode(weights, expected)
        # Measured 8.1e-5 where pixels reach 9.2, nearly all of it rounding: 6.4e-5 with a signal of 2^-30, which is the
        # identity bit by bit, and the 2D model itself is 6.9e-5 from its own result in float64.
        torch.testing.assert_close(model.decode(codes), drawn, rtol=0, atol=3e-4)
        still = pixels[:2, None].repeat(1, 8, 1, 1, 1)
        clip_codes = model.encode(still)
        assert torch.equal(clip_codes, expected[:2, None].repeat(1, 2, 1, 1)), "a clip that stands still"
        torch.testing.assert_close(model.decode(clip_codes), drawn[:2, None].repeat(1, 8, 1, 1, 1), rtol=0, atol=3e-4)


def test_what_the_identity_itself_costs(weights, checkpoint, pixels, monkeypatch):
    """In float64, where rounding does not hide it."""
    exact = {name: tensor.double() for name, tensor in weights.items()}
    with torch.no_grad():
        codes = movqgan_2d.encode(exact, pixels[:2].double())
        for bits, bound in ((10, 2e-5), (30, 1e-11)):
            monkeypatch.setattr(from_2d, "SIGNAL_BITS", bits)
            model = tokenizer_from_2d(checkpoint, CONFIG).model.double()
            # Measured 5.5e-6 and 1.2e-13 where pixels reach 9.2.
            torch.testing.assert_close(model.decode(codes), movqgan_2d.decode(exact, codes), rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("factor", "bits", "bound"),
    # Measured relative to the largest: 0, 3.6e-7, 2.4e-7, 0, 0.
    [(4, 30, 0.0), (4, 10, 1e-6), (2, 10, 1e-6), (2, 30, 0.0), (1, 10, 0.0)],
)
def test_temporal_layers_are_the_identity(checkpoint, monkeypatch, factor, bits, bound):
    config = VisionTokenizerConfig(codebook_size=OLD_CODES, temporal_downsample_factor=factor, **SHAPE)
    monkeypatch.setattr(from_2d, "SIGNAL_BITS", bits)
    start = tokenizer_from_2d(checkpoint, config)
    model, source = start.model, read_2d(checkpoint)
    with torch.no_grad():
        frames = torch.randn(2, 4, 5, 6)
        still = frames.unsqueeze(2).repeat(1, 1, 2 * factor, 1, 1)
        gain = model.quant_conv.conv.weight[0, 0, -1] / source["quant_conv.weight"][0, 0]
        found = model.encoder.time(still) * gain
        assert found.shape[2] == 2
        assert (found - still[:, :, :2]).abs().max() <= bound * frames.abs().max()
        quantized = torch.randn(2, 4, 3, 5, 6)
        gain = model.decoder.conv_in.weight[0, 0, 0, 0] / source["decoder.conv_in.weight"][0, 0, 0, 0]
        found = model.decoder.time(quantized) * gain
        expected = quantized.repeat_interleave(factor, dim=2)
        assert (found - expected).abs().max() <= bound * expected.abs().max()


def test_new_codes_win_nothing_that_the_old_ones_reach(checkpoint):
    codes = tokenizer_from_2d(checkpoint, CONFIG).model.quantize.embedding.weight.detach()
    old = codes[:OLD_CODES]
    radius = (old - old.mean(0)).norm(dim=1).max()
    directions = torch.nn.functional.normalize(torch.randn(5000, 4), dim=1)
    latents = old.mean(0) + directions * radius * 1.49 * torch.rand(5000, 1)
    assert torch.cdist(latents, codes).argmin(1).max() < OLD_CODES


def test_weights_in_units_are_trained_as_their_quotients():
    """Against AdamW on v where the weight is unit * v, clipped by norm and by value, with decay."""
    optim = VisionOptimConfig(lr=0.01, weight_decay=0.1, clip_grad=0.5, clip_grad_value=0.2, lr_warmup_steps=0)
    units = {"0.weight": 2.0**-10, "0.bias": 2.0**-10, "1.weight": 2.0**9}
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    quotients = {
        name: (weight.detach() / units.get(name, 1)).requires_grad_() for name, weight in network.named_parameters()
    }
    decays = [
        {"params": [v for v in quotients.values() if (v.ndim > 1) == flag], "weight_decay": 0.1 * flag}
        for flag in (1, 0)
    ]
    plain = torch.optim.AdamW(decays, lr=0.01, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_eps)
    optimizer = NetworkOptimizer(network, optim, 10, units=units)
    for step in range(1, 6):
        batch = torch.randn(7, 3)
        network(batch).square().sum().backward()
        expected = {name: v * units.get(name, 1) for name, v in quotients.items()}
        torch.func.functional_call(network, expected, batch).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(quotients.values(), 0.5)
        torch.nn.utils.clip_grad_value_(quotients.values(), 0.2)
        for group in plain.param_groups:
            group["lr"] = optimizer.learning_rate(step)
        plain.step()
        plain.zero_grad()
        network_norm = optimizer.step(step)["grad_norm"]
        optimizer.zero_grad()
        assert network_norm == pytest.approx(norm.item(), rel=1e-5)
    for name, weight in network.named_parameters():
        # Measured 1e-7 relative.
        torch.testing.assert_close(weight / units.get(name, 1), quotients[name], rtol=1e-5, atol=1e-6)


def test_lightning_checkpoints_and_what_is_left_out(weights, checkpoint, tmp_path):
    content = weights | {
        "loss.discriminator.main.0.weight": torch.zeros(3),
        "ema_encoder.conv_inweight": torch.zeros(2),
    }
    torch.save({"state_dict": content, "epoch": 3, "global_step": 7}, tmp_path / "last.ckpt")
    torch.manual_seed(0)
    first = tokenizer_from_2d(checkpoint, CONFIG)
    torch.manual_seed(0)
    second = tokenizer_from_2d(tmp_path / "last.ckpt", CONFIG)
    # Bitwise but for means over memory of another alignment: measured 2.5e-7.
    assert first.units == pytest.approx(second.units, rel=1e-6)
    for name, tensor in first.model.state_dict().items():
        torch.testing.assert_close(tensor, second.model.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_what_does_not_fit_is_refused(weights, checkpoint, tmp_path):
    def written(name: str, change) -> str:
        content = dict(weights)
        change(content)
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    (tmp_path / "damaged.ckpt").write_bytes(b"damaged")
    (tmp_path / "damaged.safetensors").write_bytes(b"damaged")
    torch.save({"state_dict": {}, "hyper_parameters": re.compile("x")}, tmp_path / "objects.ckpt")
    wide = VisionTokenizerConfig(codebook_size=OLD_CODES, **(SHAPE | {"ch": 64}))
    ibq = VisionTokenizerConfig(codebook_size=OLD_CODES, quantizer="ibq", **SHAPE)
    fewer = VisionTokenizerConfig(codebook_size=OLD_CODES - 1, **SHAPE)
    for path, config, match in [
        (
            written("less.ckpt", lambda content: content.pop("decoder.norm_out.conv_y.bias")),
            CONFIG,
            "conv_y.bias is missing",
        ),
        (
            written("more.ckpt", lambda content: content.update({"encoder.extra.weight": torch.ones(1)})),
            CONFIG,
            "encoder.extra",
        ),
        (checkpoint, wide, r"encoder.conv_in.weight is \(32, 3, 3, 3\), section model wants \(64, 3, 3, 3\)"),
        (checkpoint, fewer, r"quantize.embedding.weight is \(192, 4\), section model wants \(191, 4\)"),
        (checkpoint, ibq, "model.quantizer = 'ibq'"),
        (tmp_path / "absent.ckpt", CONFIG, "not readable"),
        (tmp_path / "damaged.ckpt", CONFIG, "holds more than tensors|not readable"),
        (tmp_path / "damaged.safetensors", CONFIG, "not readable"),
        # What an old Lightning writes; torch's own words on it have colours, and begin with advice to run the file.
        (tmp_path / "objects.ckpt", CONFIG, r"more than tensors \(UnpicklingError: .*re._compile.* by default\); save"),
    ]:
        with pytest.raises(InputError, match=match) as refusal:
            tokenizer_from_2d(path, config)
        assert not {"\n", "\x1b"} & set(str(refusal.value))


def test_training_begins_as_the_2d_model_and_takes_up_new_codes(weights, checkpoint, tmp_path):
    (tmp_path / "media").mkdir()
    Image.new("RGB", (32, 32), (200, 90, 30)).save(tmp_path / "media/a.png")
    arguments = [
        f"--media.inputs=[{tmp_path / 'media'}]", "--media.size=32", "--media.batch_size=1",
        "--media.augmented_share=0",
        f"--observe.run_dir={tmp_path / 'run'}", "--observe.tensorboard=false", f"--checkpoint.init_from={checkpoint}",
        f"--model.codebook_size={2 * OLD_CODES}", "--model.ch=32", "--model.ch_mult=[1,1,2]", "--train.train_steps=3",
        "--model.num_res_blocks=1", "--model.attn_resolutions=[2]", "--train.precision=fp32", "--train.num_threads=1",
        "--train.eval_interval=9", "--optim.lr=1e-5", "--train.device=cpu",
    ]  # fmt: skip
    with pytest.raises(InputError, match="codebook.kmeans_batches = 50: would replace the codes"):
        train.main(arguments)
    arguments.append("--codebook.kmeans_batches=0")
    with pytest.raises(InputError, match="codebook.restart_until_step = 0: the 192 codes"):
        train.main(arguments)
    with pytest.raises(InputError, match="absent.ckpt': not readable"):
        train.main([*arguments, "--checkpoint.init_from=absent.ckpt"])
    arguments += ["--codebook.restart_interval=2", "--codebook.restart_until_step=2"]
    train.main(arguments)
    lines = [line for line in read_json_lines(tmp_path / "run/metrics.jsonl") if "loss" in line]
    picture = torch.tensor([200.0, 90, 30]).view(1, 3, 1, 1).expand(1, 3, 32, 32) / 127.5 - 1
    with torch.no_grad():
        drawn = movqgan_2d.decode(weights, movqgan_2d.encode(weights, picture))
    assert lines[0]["loss_l2"] == pytest.approx((drawn - picture).square().mean().item(), rel=1e-5)
    assert lines[1]["codes_restarted"] >= OLD_CODES
    copy = shutil.copy(checkpoint, tmp_path / "copy.safetensors")
    arguments += [f"--checkpoint.init_from={copy}", f"--observe.run_dir={tmp_path / 'stopped'}"]
    train.main([*arguments, "--train.exit_interval=2"])
    Path(copy).unlink()
    train.main(arguments)  # what has a checkpoint needs its beginning no more
    finished = [load_vision_tokenizer(tmp_path / name / "tokenizer").identity for name in ("run", "stopped")]
    assert finished[0] == finished[1]

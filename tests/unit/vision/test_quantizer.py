"""Quantizers: which code is chosen, in how much memory; files and identities; Emu3.5's through tokenize and decode."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.config import InputError
from megatron_ext.hf.vision import check_quantizer, vq_config
from megatron_ext.vision import MoVQGAN, VisionTokenizerConfig, load_vision_tokenizer, quantizer, save_vision_tokenizer
from megatron_ext.vision.quantizer import build_quantizer, largest_product_codes, nearest_codes
from tokenizer_train.vision.quantize_loss import quantize_latents, quantizer_terms
from tools import tokenize_vision

IBQ_16 = VisionTokenizerConfig(
    codebook_size=131_072,
    embed_dim=8,
    z_channels=8,
    quantizer="ibq",
    ch=32,
    ch_mult=(1, 1, 1, 1, 1),
    num_res_blocks=1,
    attn_resolutions=(),
    temporal_downsample_factor=1,
)
"""Emu3.5's spatial factor, number of codes and quantizer; narrow."""


class LargestTensor(TorchDispatchMode):
    """Notes the most numbers that any operation put out."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        outputs = found if isinstance(found, tuple | list) else (found,)
        self.numbers = max(self.numbers, *(item.numel() for item in outputs if isinstance(item, torch.Tensor)), 0)
        return found


def test_codes_by_whole_matrices(monkeypatch):
    monkeypatch.setattr(quantizer, "ELEMENTS_AT_ONCE", 7 * 50)
    generator = torch.Generator().manual_seed(0)
    latents, codes = torch.randn(40, 6, generator=generator), torch.randn(50, 6, generator=generator)
    z, e = latents.double().numpy(), codes.double().numpy()
    assert np.array_equal(nearest_codes(latents, codes), ((z[:, None] - e) ** 2).sum(2).argmin(1))
    soft = np.exp(z @ e.T) / np.exp(z @ e.T).sum(1, keepdims=True)
    assert np.array_equal(largest_product_codes(latents, codes), soft.argmax(1))
    assert not torch.equal(nearest_codes(latents, codes), largest_product_codes(latents, codes))


@pytest.mark.parametrize("name", ["nearest", "ibq"])
def test_no_matrix_of_all_latents_and_codes_exists(name, monkeypatch):
    """2,000 x 500 numbers in one piece; in groups, chosen, differentiated and with entropies, 10,000."""
    monkeypatch.setattr(quantizer, "ELEMENTS_AT_ONCE", 20 * 500)
    made = build_quantizer(name, 500, 4)
    latents = torch.randn(2, 4, 10, 10, 10, requires_grad=True)
    with LargestTensor() as largest:
        made.assign(latents)
        quantized = quantize_latents(made, latents)
        terms = quantizer_terms(quantized, entropy_temperature=0.1)
        (sum(terms.values()) + quantized.passed_through_BDTHW.square().mean()).backward()
    assert 8_000 <= largest.numbers <= 10_000


def test_emu3s_files_and_identity_are_as_they_were(tmp_path):
    model = MoVQGAN(
        VisionTokenizerConfig(codebook_size=8, ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(1,))
    )
    with torch.no_grad():
        for index, tensor in enumerate(model.state_dict().values()):
            tensor.fill_(index)
    assert model.identity == "cfd878b338aa1458", "other quantizers, and what they need, have no part in it"
    save_vision_tokenizer(model, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == "Emu3VisionVQ" and "quantizer" not in fields


def test_ibq_from_pictures_to_codes_and_back(tmp_path):
    torch.manual_seed(0)
    model = MoVQGAN(IBQ_16).eval()
    save_vision_tokenizer(model, tmp_path / "tokenizer")
    loaded = load_vision_tokenizer(tmp_path / "tokenizer")
    assert loaded.config == IBQ_16 and loaded.identity == model.identity
    random = np.random.default_rng(0)
    picture = random.integers(0, 255, (128, 160, 3), dtype=np.uint8)
    (tmp_path / "media").mkdir()
    Image.fromarray(picture).save(tmp_path / "media/a.png")
    tokenize_vision.main(
        [
            f"--inputs=[{tmp_path / 'media'}]", f"--tokenizer={tmp_path / 'tokenizer'}",
            f"--output={tmp_path / 'codes'}",
            "--resize.min_pixels=1024", "--resize.max_pixels=65536", "--device=cpu",
        ]
    )  # fmt: skip
    with tarfile.open(tmp_path / "codes/codes-00000-00000.tar") as tar:
        codes = np.load(io.BytesIO(tar.extractfile("a.codes.npy").read()))
    manifest = json.loads((tmp_path / "codes/manifest.json").read_text())
    assert manifest["codebook_size"] == 131_072 and manifest["spatial_factor"] == 16
    assert codes.dtype == np.uint32 and codes.shape == (8, 10) and codes.max() > 65_535
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents_ND = model.latents(pixels)[0].flatten(1).T
        scores_NK = latents_ND @ model.quantize.embedding.weight.T
    assert np.array_equal(codes.flatten(), scores_NK.softmax(1).argmax(1))
    drawn = loaded.decode(torch.from_numpy(codes.astype(np.int64))[None])
    assert drawn.shape == (1, 3, 128, 160) and torch.equal(drawn, model.decode(model.encode(pixels)))


def test_other_quantizers_are_not_taken_for_emu3s(tmp_path):
    for refuse in (check_quantizer, vq_config):
        with pytest.raises(InputError, match="quantizer = 'ibq'"):
            refuse(IBQ_16)
    small = VisionTokenizerConfig(
        codebook_size=8, ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), quantizer="ibq"
    )
    save_vision_tokenizer(MoVQGAN(small), tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    assert fields["model_type"] == "Emu3VisionIBQ"
    for change, match in (
        ({"quantizer": "fsq"}, "quantizer 'fsq' must be one of nearest, ibq"),
        ({"model_type": "Emu3VisionVQ"}, "model_type 'Emu3VisionVQ' must be 'Emu3VisionIBQ'"),
    ):
        path.write_text(json.dumps(fields | change))
        with pytest.raises(InputError, match=match):
            load_vision_tokenizer(tmp_path)

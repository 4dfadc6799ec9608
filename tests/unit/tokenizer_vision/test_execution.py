"""Recomputation and compilation change what is kept and how fast it is, never what comes out."""

import copy

import pytest
import torch

from megatron_ext.vision import MoVQGAN, VisionTokenizerConfig
from tokenizer_train.vision.execution import compile_networks, recompute_blocks

CONFIG = VisionTokenizerConfig(codebook_size=8, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(1,))


def fresh_model() -> MoVQGAN:
    torch.manual_seed(0)
    return MoVQGAN(CONFIG)


def train_pass(model: MoVQGAN, pixels: torch.Tensor) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes kept for the backward pass; gradients and running statistics."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        drawn = model.render_first_frame(model.latents(pixels))
    (drawn - pixels).square().mean().backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return sum(kept.values()), found | dict(model.named_buffers())


def test_recomputed_blocks_keep_less_and_give_the_same():
    torch.manual_seed(1)
    pixels = torch.rand(1, 3, 32, 64) * 2 - 1
    plain_bytes, plain = train_pass(fresh_model(), pixels)
    model = fresh_model()
    names = list(model.state_dict())
    recompute_blocks(model, min_side=45)  # 2,025 of 2,048 pixels
    assert list(model.state_dict()) == names
    less_bytes, same = train_pass(model, pixels)
    assert plain.keys() == same.keys() and all(torch.equal(same[name], plain[name]) for name in plain)
    weights = sum(weight.nbytes for weight in model.parameters())
    # Measured: 3.2 of 28.7 MB.
    assert less_bytes - weights < 0.15 * (plain_bytes - weights)
    model = fresh_model()
    recompute_blocks(model, min_side=46)
    assert train_pass(model, pixels)[0] == plain_bytes, "smaller frames are left alone"


TINY = VisionTokenizerConfig(
    codebook_size=8, ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), temporal_downsample_factor=1
)


@pytest.mark.parametrize("recomputes", [False, True])
def test_compiled_networks_give_the_same_gradients(recomputes):
    """What torch traces, differentiates and divides between the passes, run by its own kernels: Inductor needs two
    minutes for those of this network. With Inductor's, measured once on a CPU in fp32: 4.4e-5 of the largest gradient.
    """
    torch.manual_seed(0)
    plain = MoVQGAN(TINY)
    compiled = copy.deepcopy(plain)
    names = list(compiled.state_dict())
    if recomputes:
        recompute_blocks(compiled, min_side=8)
    compile_networks(compiled, "fp32")
    assert list(compiled.state_dict()) == names
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    plain_bytes, expected = train_pass(plain, pixels)
    torch._dynamo.utils.counters.clear()
    try:
        with torch.compiler.set_stance(force_backend="aot_eager"):
            kept_bytes, found = train_pass(compiled, pixels)
            counters = torch._dynamo.utils.counters
            assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
            codes = compiled.encode(pixels)
    finally:
        torch.compiler.reset()
    assert torch.equal(codes, plain.encode(pixels))
    if recomputes:  # measured: 2.0 of 6.7 MB
        assert kept_bytes < 0.4 * plain_bytes
    largest = max(value.abs().max() for value in expected.values())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Measured: 5.7e-9.
        assert (found[name] - value).abs().max() < 1e-6 * largest, name
